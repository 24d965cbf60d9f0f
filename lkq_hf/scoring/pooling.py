"""Smoothing of scores along the prompt."""

import torch
from torch.nn import functional as F


def check_pooling(kernel_size: int, pooling: str) -> None:
    """Raises ValueError unless ``kernel_size`` is a positive odd number and ``pooling`` is "max" or "avg"."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be a positive odd number so that pooling is centred, got {kernel_size}")
    if pooling not in ("max", "avg"):
        raise ValueError(f'pooling must be "max" or "avg", got {pooling!r}')


def pool_scores(scores: torch.Tensor, kernel_size: int, pooling: str = "max") -> torch.Tensor:
    """Replaces each score by the maximum or mean over its ``kernel_size`` neighbours, itself included.

    Args:
        scores: ``[batch, kv_heads, length]``; entries of minus infinity (padding) count as zero in a mean.
        kernel_size: odd width of the neighbourhood; 1 changes nothing.
        pooling: "max" or "avg".
    """
    if kernel_size == 1:
        return scores
    padding = kernel_size // 2
    if pooling == "max":
        return F.max_pool1d(scores, kernel_size, stride=1, padding=padding)
    finite = scores.masked_fill(scores == -torch.inf, 0.0)
    return F.avg_pool1d(finite, kernel_size, stride=1, padding=padding, count_include_pad=False)
