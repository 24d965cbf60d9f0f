"""A weight as positions on its grid, while it is refined: its value, its gradients, and a step of its positions."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import use_triton

# Wider groups do not fit into a program of a kernel.
WIDEST = 4096


def levels(position: Tensor, zero: Tensor, largest: int) -> Tensor:
    """`round(position) - round(zero)` as float32 `[out, groups, group size]`, positions clamped to the grid."""
    integers = position.float() if position.dtype == torch.uint8 else position.round().clamp_(0, largest)
    return integers.unflatten(-1, (zero.shape[-1], -1)).sub_(zero.round().unsqueeze(-1))


def value_reference(position: Tensor, scale: Tensor, zero: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """The definition of `value`."""
    return levels(position, zero, largest).mul_(scale.unsqueeze(-1)).view(position.shape).to(dtype)


def value(position: Tensor, scale: Tensor, zero: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """The dequantized weight `scale * (round(position) - round(zero))`, `[out, in]`, rounded once to `dtype`.

    All tensors are contiguous.

    Args:
        position: float32 or uint8 `[out, in]`, in grid steps; rounded into `0 .. largest`.
        scale: float32 `[out, groups]`.
        zero: float32 `[out, groups]`, in grid steps.
        largest: the largest integer of the grid.
        dtype: of the result.
    """
    if _use_triton(position, scale):
        from lkq_hf.kernels.grid_positions_triton import value_triton

        return value_triton(position, scale, zero, largest, dtype)
    return value_reference(position, scale, zero, largest, dtype)


def gradients_reference(
    gradient: Tensor, position: Tensor, scale: Tensor, zero: Tensor, largest: int, of_position: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The definition of `gradients`."""
    grouped = gradient.float().reshape(*scale.shape, -1)
    moved = (grouped * scale.unsqueeze(-1)).view(position.shape) if of_position else None
    return moved, levels(position, zero, largest).mul_(grouped).sum(-1), -scale * grouped.sum(-1)


def gradients(
    gradient: Tensor, position: Tensor, scale: Tensor, zero: Tensor, largest: int, of_position: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of `value` for positions, scales and zero points, rounding taken for the identity.

    Args:
        gradient: of the dequantized weight, `[out, in]`, in any floating dtype.
        position, scale, zero, largest: as `value` got them.
        of_position: whether the first one is needed.

    Returns:
        Float32 `[out, in]` or `None`, `[out, groups]` and `[out, groups]`.
    """
    if _use_triton(position, scale, gradient):
        from lkq_hf.kernels.grid_positions_triton import gradients_triton

        return gradients_triton(gradient, position, scale, zero, largest, of_position)
    return gradients_reference(gradient, position, scale, zero, largest, of_position)


def move_reference(
    position: Tensor,
    gradient: Tensor,
    scale: Tensor,
    start: Tensor,
    curvature: tuple[Tensor, Tensor],
    rate: float,
    bound: float,
    largest: int,
    margin: float,
) -> None:
    """The definition of `move`."""
    rows, columns = curvature
    steps = torch.outer(rows, columns).mul_(scale.repeat_interleave(position.shape[1] // scale.shape[1], 1).square_())
    away = (gradient / steps.clamp_(min=torch.finfo(torch.float32).tiny)).clamp_(-1, 1)
    away.add_(position - position.round().clamp_(0, largest))
    position.sub_(away, alpha=rate)
    origin = start.float()
    torch.maximum(torch.minimum(position, origin + bound), origin - bound, out=position)
    position.clamp_(-margin, largest + margin)


def move(
    position: Tensor,
    gradient: Tensor,
    scale: Tensor,
    start: Tensor,
    curvature: tuple[Tensor, Tensor],
    rate: float,
    bound: float,
    largest: int,
    margin: float,
) -> None:
    """Moves positions toward their vertices, in place: to where the loss is least in each with all others fixed.

    With the curvature `h` of the loss in a weight, the vertex lies `-dL/dw / (h s)` grid steps from its integer; it is
    sought at most one step away.

    Args:
        position: float32 `[out, in]`, contiguous like all others.
        gradient: of the loss for `position`, float32 `[out, in]`.
        scale: float32 `[out, groups]`.
        start: uint8 `[out, in]`: the integers that positions keep near.
        curvature: of the loss in the weights: the outer product of these, float32 `[out]` and `[in]`.
        rate: the part of the way that is gone.
        bound: the largest distance from `start`, in grid steps.
        largest: the largest integer of the grid.
        margin: how far a position may pass the ends of the grid; less than a half, so that it rounds to them.
    """
    if _use_triton(position, scale):
        from lkq_hf.kernels.grid_positions_triton import move_triton

        move_triton(position, gradient, scale, start, curvature, rate, bound, largest, margin)
    else:
        move_reference(position, gradient, scale, start, curvature, rate, bound, largest, margin)


def _use_triton(position: Tensor, scale: Tensor, *others: Tensor) -> bool:
    return position.shape[1] // scale.shape[1] <= WIDEST and use_triton(position, scale, *others)
