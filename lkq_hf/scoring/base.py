"""What a scorer sees and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class PrefillAttention:
    """One attention layer in a forward that reads tokens: ``length`` entries, of which some will be kept.

    In the forward that reads the first prompt the entries are the prompt's tokens. Later they are what was kept of
    the text before, which may differ by head, and the tokens since.

    Attributes:
        query: ``[batch, heads, new_length + suffix_length, head_dim]``, with rotary embedding applied.
        key: ``[batch, kv_heads, length + suffix_length, head_dim]``, with rotary embedding applied.
        value: ``[batch, kv_heads, length + suffix_length, value_dim]``.
        length: entries to choose from, padding included.
        suffix_length: tokens appended for this forward only.
        budget: entries that will be kept per KV head, on average.
        scaling: factor of the attention logits.
        softcap: bound of the attention logits (Gemma 2), or None.
        mask: True for real entries: ``[batch, length]``, or ``[batch, kv_heads, length]`` where heads hold different
            entries; None if all are real.
        layer_index: index of the layer in the model.
        new_length: how many of the last tokens have queries: those that this forward reads, and for a scorer with
            `Scorer.observed_queries` some of the piece of the prompt before. None if all have.
        sinks: ``[heads]``, an extra logit in each query head's softmax that belongs to no key (gpt-oss); None if there
            is none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    length: int
    suffix_length: int
    budget: int
    scaling: float
    softcap: float | None
    mask: torch.Tensor | None
    layer_index: int
    new_length: int | None = None
    sinks: torch.Tensor | None = None

    @property
    def head_mask(self) -> torch.Tensor | None:
        """`mask` as ``[batch, 1 or kv_heads, length]``."""
        return self.mask[:, None] if self.mask is not None and self.mask.ndim == 2 else self.mask


class PerLayerEmbedding(NamedTuple):
    """What a decoder embeds tokens to once per layer, beside their embedding (Gemma 3n).

    Attributes:
        embed: token ids ``[batch, length]`` to ``[batch, length, layers, hidden_per_layer]``.
        shape: layers and hidden_per_layer.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, int]

    @classmethod
    def of(cls, decoder: Any) -> "PerLayerEmbedding | None":
        """The decoder's; None if it has none."""
        size = getattr(decoder.config, "hidden_size_per_layer_input", None)
        if not size:
            return None
        embed = decoder.get_per_layer_inputs
        if "inputs_embeds" in signature(embed).parameters:
            embed = partial(embed, inputs_embeds=None)
        return cls(embed, (decoder.config.num_hidden_layers, size))


class Scorer(ABC):
    """Gives every prompt entry of every KV head a score; the entries with the highest scores stay in the cache.

    A subclass implements `score`. One that takes parameters from the model also implements `bind`, and one
    that needs tokens after the prompt (learned ones, or a response) `suffix`. A scorer holds no modules and no
    state of a forward, so that caches can be copied.
    """

    uses_adapter: bool = False
    """Whether the lookahead adapter's LoRA is active on the suffix."""

    @property
    def observed_queries(self) -> int:
        """How many of the last tokens' queries it looks at."""
        return 0

    def bind(self, decoder: nn.Module) -> "Scorer":
        """The scorer for this model: called once per prefill, before any work, and the place to refuse a model."""
        return self

    def suffix(self, decoder: nn.Module) -> torch.Tensor | None:
        """Embeddings to append after the prompt, ``[1 or batch, suffix_length, hidden]``, or None."""
        return None

    def suffix_per_layer(self, decoder: nn.Module) -> torch.Tensor | None:
        """For models that embed every token once per layer: the suffix's, ``[1 or batch, suffix_length, layers,
        hidden_per_layer]``. None where there is no suffix."""
        return None

    @abstractmethod
    def score(self, attention: PrefillAttention) -> torch.Tensor:
        """Scores of the prompt's entries: float32 ``[batch, kv_heads, length]``, higher is more important.

        Scores of padding need no care: they are overruled afterwards.
        """
