"""Scores from the attention of the prompt's last tokens (SnapKV, arXiv 2404.14469)."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lkq_hf.kernels.lookahead_scores import lookahead_scores
from lkq_hf.scoring.base import PrefillAttention, Scorer
from lkq_hf.scoring.pooling import check_pooling, pool_scores


@dataclass(frozen=True)
class SnapKVScorer(Scorer):
    """Mean attention that the last ``window`` prompt tokens pay to the keys before them; the window itself is kept.

    Args:
        window: number of last prompt tokens that observe; at most the budget is used.
        kernel_size: odd width of the pooling along the prompt, 1 for none.
        pooling: "max", "avg" or "sum" of the neighborhood.
        neighbor_weight: what each neighbor counts in a sum, from 0 (excluded) to 1.
    """

    window: int = 32
    kernel_size: int = 7
    pooling: str = "max"
    neighbor_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}")
        check_pooling(self.kernel_size, self.pooling, self.neighbor_weight)

    @property
    def observed_queries(self) -> int:
        return self.window

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        new = attention.length if attention.new_length is None else attention.new_length
        window = min(self.window, attention.budget, new)
        before = attention.length - window
        scores = lookahead_scores(
            attention.query[:, :, new - window : new],
            attention.key[:, :, : attention.length],
            attention.scaling,
            mask=None if attention.mask is None else attention.mask[..., :before],
            softcap=attention.softcap,
            sinks=attention.sinks,
        )
        pooled = pool_scores(scores, self.kernel_size, self.pooling, self.neighbor_weight)
        return F.pad(pooled, (0, window), value=torch.inf)
