"""Which entries stay, as `share_out` decides, but differentiable in the scores."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lkq_hf.cache.allocation import FLOOR, MOST

SOFT_ALLOCATIONS = ("global", "layer", "uniform")
"""The allocations that an adapter can be trained for. A "profile" is the mean of what "global" keeps."""


def soft_top_k(scores: torch.Tensor, budget: int, temperature: float) -> torch.Tensor:
    """Logarithms of gates between 0 and 1, open for the ``budget`` largest scores, with gradients to all scores.

    The gate of the entry of rank ``r`` is ``sigmoid(log((budget + 1/2) / r) / temperature)``: values depend on the
    order alone, so that nothing is won by scores that hardly differ, which would open all gates a little. Gradients
    are those of ``sigmoid((score - threshold) / temperature)`` with the threshold moving so that the sum of the gates
    stays what it is: what one entry gains others lose.

    Args:
        scores: ``[..., length]``; minus infinity on padding, whose gates are closed.
        budget: number of open gates.
        temperature: the lower, the harder the choice. At 0.1 an entry ranked a tenth beyond the budget is about a
            quarter open.
    """
    return _gates(scores, _openness(budget, _ranks(scores), scores.dtype), temperature)


def soft_share_out(
    scores: Sequence[torch.Tensor], budget: int, allocation: str, temperature: float
) -> list[torch.Tensor]:
    """`soft_top_k` under an allocation: the open gates are those of the entries that ``share_out`` keeps.

    Where heads compete, an entry's rank among all of their entries decides, within two limits of its own head: the
    entries that each head keeps for itself are open, and those beyond the most that a head may keep are closed. The
    entries that one limit decides about share a moving threshold.

    Args:
        scores: for each layer ``[batch, kv_heads, length]``, all of one length and on one device; minus infinity on
            padding.
        budget: mean number of entries per KV head.
        allocation: one of `SOFT_ALLOCATIONS`.
        temperature: see `soft_top_k`.

    Returns:
        For each layer the logarithms of its gates, ``[batch, kv_heads, length]``.

    Raises:
        ValueError: another allocation.
    """
    if allocation not in SOFT_ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(SOFT_ALLOCATIONS)}, got {allocation!r}")
    if allocation == "layer":
        return [_soft_compete(layer, budget, temperature) for layer in scores]
    choose = soft_top_k if allocation == "uniform" else _soft_compete
    # All layers in one tensor: one sort instead of many.
    together = choose(torch.cat(list(scores), dim=1), budget, temperature)
    return list(together.split([layer.shape[1] for layer in scores], dim=1))


def _soft_compete(scores: torch.Tensor, budget: int, temperature: float) -> torch.Tensor:
    """Log-gates of heads that compete, ``[batch, heads, length]``."""
    floor, most = max(1, round(FLOOR * budget)), MOST * budget
    real = scores > -torch.inf
    in_head = _ranks(scores)
    slots = budget * scores.shape[1] - real.sum(-1).clamp(max=floor).sum(-1)
    # The rank among those that compete: neither kept by their head anyway, nor beyond what it may keep.
    competing = (real & (in_head > floor) & (in_head <= most)).flatten(1)
    order = scores.detach().flatten(1).argsort(-1, descending=True)
    places = competing.gather(1, order).cumsum(-1).clamp(min=1)
    among_all = torch.empty_like(order).scatter_(1, order, places).view(scores.shape)
    by_all = _openness(slots[:, None, None], among_all, scores.dtype)
    by_floor, by_most = (_openness(limit, in_head, scores.dtype) for limit in (floor, most))
    openness = torch.minimum(torch.maximum(by_all, by_floor), by_most)
    return _gates(scores, openness, temperature, openness == by_all)


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Of each score along the last dimension, 1 for the largest."""
    places = torch.arange(1, scores.shape[-1] + 1, device=scores.device).expand(scores.shape)
    order = scores.detach().argsort(-1, descending=True)
    return torch.empty_like(order).scatter_(-1, order, places)


def _openness(limit: int | torch.Tensor, ranks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Above 0 up to the limit, below 0 beyond it."""
    return torch.log((limit + 0.5) / ranks.to(dtype))


def _gates(
    scores: torch.Tensor, openness: torch.Tensor, temperature: float, shared: torch.Tensor | None = None
) -> torch.Tensor:
    """Logarithms of ``sigmoid(openness / temperature)``, with the gradients of moving thresholds.

    Args:
        scores: ``[..., length]``.
        openness: of the same shape, without gradients.
        temperature: softness.
        shared: ``[batch, heads, length]``, True for the entries that the threshold of all heads decides about; the
            others have one for each head. None if there is none of all heads.
    """
    padding = scores == -torch.inf
    gates = torch.sigmoid(openness / temperature)
    slopes = (gates * (1 - gates)).masked_fill(padding, 0.0)
    # Infinities have no part in gradients: theirs would be undefined.
    finite = scores.masked_fill(padding, 0.0)
    change = finite - finite.detach()
    if shared is None:
        threshold = _mean(change, slopes, (-1,))
    else:
        threshold = torch.where(
            shared, _mean(change, slopes * shared, (-2, -1)), _mean(change, slopes * ~shared, (-1,))
        )
    change = change - threshold
    return F.logsigmoid((openness + change) / temperature).masked_fill(padding, -torch.inf)


def _mean(values: torch.Tensor, weights: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    total = weights.sum(dims, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return (weights / total * values).sum(dims, keepdim=True)
