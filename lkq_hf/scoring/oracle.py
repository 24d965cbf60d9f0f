"""Scores from the attention of a known response: the ceiling of every comparison (arXiv 2603.10899, section 3)."""

from dataclasses import dataclass

import torch
from torch import nn

from lkq_hf.kernels.lookahead_scores import lookahead_scores
from lkq_hf.scoring.base import PerLayerEmbedding, PrefillAttention, Scorer
from lkq_hf.scoring.pooling import check_pooling, pool_scores


@dataclass(frozen=True, eq=False)
class OracleScorer(Scorer):
    """Mean attention that the response's tokens pay to each prompt key.

    The response is appended to the prompt in the prefill and dropped afterwards, so this costs its length and is
    possible only where the response is known: it shows what a perfect prediction would keep.

    Args:
        response_ids: ``[batch, response_length]`` token ids that follow the prompt.
        response_mask: ``[batch, response_length]``, True for real tokens, with padding on the right only; None if the
            responses are equally long.
        kernel_size: odd width of the pooling along the prompt, 1 for none.
        pooling: "max", "avg" or "sum" of the neighborhood.
        neighbor_weight: what each neighbor counts in a sum, from 0 (excluded) to 1.
    """

    response_ids: torch.Tensor
    response_mask: torch.Tensor | None = None
    kernel_size: int = 1
    pooling: str = "max"
    neighbor_weight: float = 1.0

    def __post_init__(self) -> None:
        check_pooling(self.kernel_size, self.pooling, self.neighbor_weight)
        if self.response_ids.ndim != 2 or self.response_ids.shape[1] == 0:
            raise ValueError(
                "response_ids must be [batch, response_length] with at least one token, "
                f"got shape {tuple(self.response_ids.shape)}"
            )
        if self.response_mask is not None:
            if self.response_mask.shape != self.response_ids.shape:
                raise ValueError(
                    f"response_mask must have the shape of response_ids, {tuple(self.response_ids.shape)}, "
                    f"got {tuple(self.response_mask.shape)}"
                )
            if not bool(self.response_mask[:, 0].all()):
                raise ValueError("every response needs at least one token, and padding belongs on the right")

    def suffix(self, decoder: nn.Module) -> torch.Tensor:
        embedding: nn.Module = decoder.get_input_embeddings()  # type: ignore[operator]
        return embedding(self.response_ids)

    def suffix_per_layer(self, decoder: nn.Module) -> torch.Tensor | None:
        per_layer = PerLayerEmbedding.of(decoder)
        return None if per_layer is None else per_layer.embed(self.response_ids)

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        scores = lookahead_scores(
            attention.query[:, :, -attention.suffix_length :],
            attention.key,
            attention.scaling,
            mask=attention.mask,
            row_mask=None if self.response_mask is None else self.response_mask.to(attention.key.device),
            softcap=attention.softcap,
            sinks=attention.sinks,
        )
        return pool_scores(scores, self.kernel_size, self.pooling, self.neighbor_weight)
