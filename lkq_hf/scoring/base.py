"""What a scorer sees and what it returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class PrefillAttention:
    """One attention layer during the prefill of a prompt of ``length`` tokens and ``suffix_length`` appended ones.

    Attributes:
        query: ``[batch, heads, length + suffix_length, head_dim]``, with rotary embedding applied.
        key: ``[batch, kv_heads, length + suffix_length, head_dim]``, with rotary embedding applied.
        value: ``[batch, kv_heads, length + suffix_length, value_dim]``.
        length: tokens of the prompt, padding included.
        suffix_length: tokens appended after the prompt for this forward only.
        budget: entries that will be kept per KV head.
        scaling: factor of the attention logits.
        softcap: bound of the attention logits (Gemma 2), or None.
        mask: ``[batch, length]``, True where the prompt has a real token; None if there is no padding.
        layer_index: index of the layer in the model.
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


class Scorer(ABC):
    """Gives every prompt entry of every KV head a score; the entries with the highest scores stay in the cache.

    A subclass implements :meth:`score`. One that takes parameters from the model implements :meth:`bind`. One that needs tokens after the prompt (learned ones, or a response) also
    implements :meth:`suffix`. A scorer holds no modules and no state of a forward, so that caches can be copied.
    """

    uses_adapter: bool = False
    """Whether the lookahead adapter's LoRA is active on the suffix."""

    def bind(self, decoder: nn.Module) -> "Scorer":
        """The scorer for this model: called once per prefill, before any work, and the place to refuse a model."""
        return self

    def suffix(self, decoder: nn.Module) -> torch.Tensor | None:
        """Embeddings to append after the prompt, ``[1 or batch, suffix_length, hidden]``, or None."""
        return None

    @abstractmethod
    def score(self, attention: PrefillAttention) -> torch.Tensor:
        """Scores of the prompt's entries: float32 ``[batch, kv_heads, length]``, higher is more important.

        Scores of padding need no care: they are overruled afterwards.
        """
