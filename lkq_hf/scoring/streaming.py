"""Attention sinks and recency (StreamingLLM, arXiv 2309.17453)."""

from dataclasses import dataclass

import torch

from lkq_hf.scoring.base import PrefillAttention, Scorer


@dataclass(frozen=True)
class StreamingScorer(Scorer):
    """Keeps the first ``sinks`` tokens of the prompt and fills the budget with its last ones.

    Args:
        sinks: number of first tokens to keep.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        batch, kv_heads = attention.key.shape[:2]
        place = torch.arange(attention.length, dtype=torch.float32, device=attention.key.device)
        # The sinks are the first real tokens; they are never dropped, so they stay the first entries.
        real = place if attention.head_mask is None else attention.head_mask.cumsum(-1) - 1
        return place.expand(batch, kv_heads, -1).masked_fill(real < self.sinks, torch.inf)
