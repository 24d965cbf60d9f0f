"""How many entries each head of each layer keeps: one budget, shared out by the scores."""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

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
    scores: Sequence[torch.Tensor],
    budget: int,
    allocation: str,
    profile: Sequence[torch.Tensor] | None = None,
    most: int | None = None,
) -> list[torch.Tensor]:
    """Which candidates stay.

    A row keeps ``budget`` entries per head on average, or all where it has fewer. Deterministic: among equal scores
    the earlier layer, head and position wins.

    Args:
        scores: for each layer float32 ``[batch, kv_heads, candidates]``; minus infinity for what is no candidate.
        budget: mean number of entries per KV head.
        allocation: one of `ALLOCATIONS`.
        profile: for "profile", for each layer how many entries each head keeps, ``[kv_heads]``.
        most: where heads compete, none keeps more; None if there are no more candidates.

    Returns:
        For each layer bool ``[batch, kv_heads, candidates]``, on the device of its scores.

    Raises:
        ValueError: "profile" without a profile.
    """
    if allocation == "profile" and profile is None:
        raise ValueError('allocation "profile" needs the number of entries that each head keeps, got None')
    numbers = None if profile is None or allocation != "profile" else _stacked([n[None, :, None] for n in profile], 0)
    keep = share_out_stacked(
        _stacked(scores, -math.inf), [layer.shape[1] for layer in scores], budget, allocation, numbers, most
    )
    return [
        part[:, : layer.shape[1], : layer.shape[2]].to(layer.device)
        for part, layer in zip(keep.unbind(), scores, strict=True)
    ]


def share_out_stacked(
    together: torch.Tensor,
    heads: Sequence[int],
    budget: int,
    allocation: str,
    numbers: torch.Tensor | None = None,
    most: int | None = None,
) -> torch.Tensor:
    """`share_out` of layers that lie in one tensor.

    Args:
        together: float32 ``[layers, batch, kv_heads, candidates]``; minus infinity for what is no candidate.
        heads: KV heads of each layer; where they are fewer than ``kv_heads``, the others have no candidates.
        budget: mean number of entries per KV head.
        allocation: one of `ALLOCATIONS`.
        numbers: for "profile", how many entries each head keeps, ``[layers, 1, kv_heads, 1]``.
        most: where heads compete, none keeps more; None if there are no more candidates.

    Returns:
        bool ``[layers, batch, kv_heads, candidates]``.
    """
    ranks = _ranks(together)
    if allocation in ("global", "layer"):
        if most is not None:
            together = together.masked_fill(ranks >= most, -math.inf)
        return _compete(together, ranks, budget, [sum(heads)] if allocation == "global" else heads)
    limit = budget if numbers is None or allocation == "uniform" else numbers.to(together.device)
    return (ranks < limit) & (together > -math.inf)


def _stacked(layers: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    """Layers ``[batch, kv_heads, candidates]`` as one tensor ``[layers, ...]``, on the device of the first.

    Where one has fewer heads or candidates than others, ``value`` is in their place.
    """
    heads, most = (max(layer.shape[dim] for layer in layers) for dim in (1, 2))
    missing = [(0, most - layer.shape[2], 0, heads - layer.shape[1]) for layer in layers]
    return torch.stack([
        (pad(layer, sizes, value=value) if any(sizes) else layer).to(layers[0].device)
        for layer, sizes in zip(layers, missing, strict=True)
    ])  # fmt: skip


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Of each score among those of its head, 0 for the best."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    return ranks.scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))


def _compete(scores: torch.Tensor, ranks: torch.Tensor, budget: int, heads: Sequence[int]) -> torch.Tensor:
    """One threshold for each row, and over all layers or for each, beyond what each head keeps for itself.

    Args:
        scores: ``[layers, batch, kv_heads, candidates]``.
        ranks: of each score among those of its head.
        budget: mean number of entries per KV head.
        heads: KV heads of each layer, or for one threshold over all layers their sum.
    """
    safe = (ranks < max(1, round(FLOOR * budget))) & (scores > -math.inf)
    others = scores.masked_fill(safe, -math.inf)
    if len(heads) == 1:
        safe, others = (each.transpose(0, 1).flatten(1)[None] for each in (safe, others))
    slots = -safe.flatten(2).sum(-1, keepdim=True)
    for layer, count in zip(slots, heads, strict=True):
        layer += budget * count
    keep = safe.flatten(2) | ((_ranks(others.flatten(2)) < slots) & (others.flatten(2) > -math.inf))
    if len(heads) == 1:
        keep = keep[0].unflatten(1, (scores.shape[0], -1)).transpose(0, 1)
    return keep.reshape(scores.shape)
