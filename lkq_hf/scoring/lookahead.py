"""Scores from the attention of learned lookahead tokens (LookaheadKV, arXiv 2603.10899)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lkq_hf.kernels.lookahead_scores import lookahead_scores
from lkq_hf.scoring.base import PrefillAttention, Scorer
from lkq_hf.scoring.pooling import check_pooling, pool_scores

ADAPTER_ATTRIBUTE = "lookahead"
"""Name under which the adapter attaches its learned tokens to the decoder."""


@dataclass(frozen=True)
class LookaheadScorer(Scorer):
    """Mean attention that the adapter's learned tokens, appended after the prompt, pay to each prompt key.

    Needs a model with a ``LOOKAHEAD_KV`` adapter, whose config also says which mean it was trained for.

    Args:
        kernel_size: odd width of the pooling along the prompt, 1 for none. None takes the pooling, as a whole, that
            the adapter's config recommends.
        pooling: "max", "avg" or "sum" of the neighborhood; only with a ``kernel_size``.
        neighbor_weight: what each neighbor counts in a sum, from 0 (excluded) to 1.
        row_power: exponent of the power mean over the learned tokens. None takes the adapter's.
    """

    kernel_size: int | None = None
    pooling: str = "max"
    neighbor_weight: float = 1.0
    row_power: float | None = None
    uses_adapter = True

    def __post_init__(self) -> None:
        check_pooling(1 if self.kernel_size is None else self.kernel_size, self.pooling, self.neighbor_weight)
        if self.kernel_size is None and self.pooling != "max":
            raise ValueError(
                f"pooling={self.pooling!r} needs a kernel_size: without one, the adapter's config says how to pool"
            )

    def bind(self, decoder: nn.Module) -> Scorer:
        tokens = self._adapter_tokens(decoder)
        tokens.check_complete(decoder)
        pooling = tokens.pooling() if self.kernel_size is None else {}
        return replace(self, **pooling, row_power=tokens.row_power() if self.row_power is None else self.row_power)

    def suffix(self, decoder: nn.Module) -> torch.Tensor:
        return self._adapter_tokens(decoder).active_tokens()

    def suffix_per_layer(self, decoder: nn.Module) -> torch.Tensor | None:
        return self._adapter_tokens(decoder).active_rows()

    @staticmethod
    def _adapter_tokens(decoder: nn.Module) -> Any:
        tokens = getattr(decoder, ADAPTER_ATTRIBUTE, None)
        if tokens is None:
            raise ValueError(
                f"LookaheadCache with the lookahead scorer needs a LOOKAHEAD_KV adapter, and {type(decoder).__name__} "
                "has none. Load one with model.load_adapter(...), or choose a scorer that needs no adapter, "
                'such as LookaheadCache(budget=..., scorer="snapkv").'
            )
        return tokens

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        scores = lookahead_scores(
            attention.query[:, :, -attention.suffix_length :],
            attention.key,
            attention.scaling,
            mask=attention.mask,
            softcap=attention.softcap,
            sinks=attention.sinks,
            row_power=self.row_power or 1.0,
        )
        return pool_scores(scores, self.kernel_size or 1, self.pooling, self.neighbor_weight)
