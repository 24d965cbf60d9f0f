"""Smoothing of scores along the prompt."""

import torch
from torch.nn import functional as F

POOLINGS = ("max", "avg", "sum")


def check_pooling(kernel_size: int, pooling: str, neighbor_weight: float = 1.0) -> None:
    """Raises ValueError for arguments that `pool_scores` does not take."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be a positive odd number so that pooling is centred, got {kernel_size}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if not 0 < neighbor_weight <= 1:
        raise ValueError(f"neighbor_weight must be above 0 and at most 1, got {neighbor_weight}")
    if neighbor_weight != 1 and pooling != "sum":
        raise ValueError(f'neighbor_weight={neighbor_weight} needs pooling="sum", got {pooling!r}')


def pool_scores(
    scores: torch.Tensor, kernel_size: int, pooling: str = "max", neighbor_weight: float = 1.0
) -> torch.Tensor:
    """Replaces each score by one of its neighborhood of ``kernel_size`` scores, itself in the middle.

    Args:
        scores: ``[batch, kv_heads, length]``, not negative, or minus infinity (padding), which counts as zero in an
            average or sum.
        kernel_size: odd width of the neighborhood; 1 changes nothing.
        pooling: "max", "avg" (of the neighbors that exist), or "sum": the score plus ``neighbor_weight`` times each
            of its neighbors.
        neighbor_weight: from 0 (excluded) to 1, for "sum" alone.
    """
    if kernel_size == 1:
        return scores
    padding = kernel_size // 2
    if pooling == "max":
        return F.max_pool1d(scores, kernel_size, stride=1, padding=padding)
    finite = scores.clamp(min=0.0)
    if pooling == "avg":
        return F.avg_pool1d(finite, kernel_size, stride=1, padding=padding, count_include_pad=False)
    window = F.avg_pool1d(finite, kernel_size, stride=1, padding=padding) * kernel_size
    return torch.lerp(finite, window, neighbor_weight)
