"""How many entries each head of each layer keeps: one budget, shared out by the scores."""

import math
from collections.abc import Sequence

import torch

ALLOCATIONS = ("global", "layer", "uniform", "profile")
"""``global``: heads of all layers compete. ``layer``: heads of a layer compete. ``uniform``: each head keeps the same
number. ``profile``: each head keeps a number fixed beforehand."""

FLOOR = 0.2
"""Share of the mean that every head keeps for itself."""

MOST = 4
"""No head keeps more than this many times the mean, so that a prefill need not hold more of a layer than that."""


def most_of_a_head(budget: int, allocation: str, profile: torch.Tensor | None = None) -> int:
    """Entries that one head may keep at most when the mean is ``budget``."""
    if allocation == "uniform":
        return budget
    if allocation == "profile":
        return budget if profile is None else max(int(profile.max()), 1)
    return MOST * budget


def share_out(
    scores: Sequence[torch.Tensor], budget: int, allocation: str, profile: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Which candidates stay.

    A row keeps ``budget`` entries per head on average, or all where it has fewer. Deterministic: among equal scores
    the earlier layer, head and position wins.

    Args:
        scores: for each layer float32 ``[batch, kv_heads, candidates]``; minus infinity for what is no candidate.
        budget: mean number of entries per KV head.
        allocation: one of :data:`ALLOCATIONS`.
        profile: for "profile", for each layer how many entries each head keeps, ``[kv_heads]``.

    Returns:
        For each layer bool ``[batch, kv_heads, candidates]``, on the device of its scores.

    Raises:
        ValueError: "profile" without a profile.
    """
    if allocation == "uniform":
        return [_best(layer, torch.full(layer.shape[1:2], budget)) for layer in scores]
    if allocation == "profile":
        if profile is None:
            raise ValueError('allocation "profile" needs the number of entries that each head keeps, got None')
        return [_best(layer, numbers) for layer, numbers in zip(scores, profile, strict=True)]
    if allocation == "layer":
        return [keep for layer in scores for keep in _compete([layer], budget)]
    return _compete(scores, budget)


def _best(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The ``numbers [kv_heads]`` best candidates of each head."""
    return (_ranks(scores) < numbers.to(scores.device)[:, None]) & (scores > -math.inf)


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Of each score among those of its head, 0 for the best."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    return ranks.scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))


def _compete(scores: Sequence[torch.Tensor], budget: int) -> list[torch.Tensor]:
    """One threshold for each row over all heads of ``scores``, beyond what each head keeps for itself."""
    device = scores[0].device
    floor = max(1, round(FLOOR * budget))
    best, others = [], []
    for layer in scores:
        safe = (_ranks(layer) < floor) & (layer > -math.inf)
        best.append(safe.flatten(1).to(device))
        others.append(layer.masked_fill(safe, -math.inf).flatten(1).to(device))
    keep, together = torch.cat(best, dim=1), torch.cat(others, dim=1)
    heads = sum(layer.shape[1] for layer in scores)
    slots = budget * heads - keep.sum(1, keepdim=True)
    keep |= (_ranks(together) < slots) & (together > -math.inf)
    parts = keep.split([layer.shape[1] * layer.shape[2] for layer in scores], dim=1)
    return [part.view(layer.shape).to(layer.device) for part, layer in zip(parts, scores, strict=True)]
