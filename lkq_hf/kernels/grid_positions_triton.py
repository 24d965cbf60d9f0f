"""Triton kernels of `lkq_hf.kernels.grid_positions`: each reads and writes a weight once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, next_power_of_2
from lkq_hf.kernels.round_columns_triton import nearest

# Weights of one program: as many as the widest group has that comes here (`grid_positions.WIDEST`).
WEIGHTS = 4096


@triton.jit
def _places(groups, size, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """The groups of this program, the places of their weights, and which of both there are."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, SIZE)
    inside = group < groups
    return group, group[:, None] * size + column[None, :], inside, inside[:, None] & (column < size)[None, :]


@triton.jit
def _integer(position, largest):
    # Clamped to one step outside the grid first: the same integer, and small enough to be rounded by an addition.
    return tl.minimum(tl.maximum(nearest(tl.minimum(tl.maximum(position, -1.0), largest + 1.0)), 0.0), largest)


@triton.jit
def _value(
    position, scale, zero, result, groups, size, largest, GROUPS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    group, place, inside, each = _places(groups, size, GROUPS, SIZE)
    integer = _integer(tl.load(position + place, mask=each, other=0).to(tl.float32), largest)
    s = tl.load(scale + group, mask=inside, other=0.0)
    z = nearest(tl.load(zero + group, mask=inside, other=0.0))
    weight = (integer - z[:, None]) * s[:, None]
    tl.store(result + place, weight.to(result.dtype.element_ty), mask=each)


@triton.jit
def _gradients(
    gradient, position, scale, zero, of_position, of_scale, of_zero, groups, size, largest,
    POSITION: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group, place, inside, each = _places(groups, size, GROUPS, SIZE)
    g = tl.load(gradient + place, mask=each, other=0.0).to(tl.float32)
    integer = _integer(tl.load(position + place, mask=each, other=0).to(tl.float32), largest)
    s = tl.load(scale + group, mask=inside, other=0.0)
    z = nearest(tl.load(zero + group, mask=inside, other=0.0))
    if POSITION:
        tl.store(of_position + place, g * s[:, None], mask=each)
    tl.store(of_scale + group, tl.sum((integer - z[:, None]) * g, 1), mask=inside)
    tl.store(of_zero + group, -s * tl.sum(g, 1), mask=inside)


@triton.jit
def _move(
    position, gradient, scale, start, rows, columns, groups, size, groups_of_row, rate, bound, largest, margin,
    smallest, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group, place, inside, each = _places(groups, size, GROUPS, SIZE)
    here = tl.load(position + place, mask=each, other=0.0)
    g = tl.load(gradient + place, mask=each, other=0.0)
    origin = tl.load(start + place, mask=each, other=0).to(tl.float32)
    s = tl.load(scale + group, mask=inside, other=0.0)
    row, first = group // groups_of_row, (group % groups_of_row) * size
    of_row = tl.load(rows + row, mask=inside, other=0.0)
    of_column = tl.load(columns + first[:, None] + tl.arange(0, SIZE)[None, :], mask=each, other=0.0)
    curvature = tl.maximum(of_row[:, None] * of_column * (s * s)[:, None], smallest)
    away = tl.minimum(tl.maximum(tl.div_rn(g, curvature), -1.0), 1.0) + (here - _integer(here, largest))
    moved = here - rate * away
    moved = tl.maximum(tl.minimum(moved, origin + bound), origin - bound)
    tl.store(position + place, tl.minimum(tl.maximum(moved, -margin), largest + margin), mask=each)


def value_triton(position: Tensor, scale: Tensor, zero: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """See `lkq_hf.kernels.grid_positions.value`."""
    result = torch.empty_like(position, dtype=dtype)
    grid, shape, constants = _launch(position, scale)
    with torch.cuda.device_of(position):
        _value[grid](position, scale, zero, result, *shape, float(largest), **constants)
    return result


def gradients_triton(
    gradient: Tensor, position: Tensor, scale: Tensor, zero: Tensor, largest: int, of_position: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """See `lkq_hf.kernels.grid_positions.gradients`."""
    moved = torch.empty_like(position, dtype=torch.float32) if of_position else None
    of_scale, of_zero = torch.empty_like(scale), torch.empty_like(scale)
    grid, shape, constants = _launch(position, scale)
    with torch.cuda.device_of(position):
        _gradients[grid](
            gradient.contiguous(), position, scale, zero, of_scale if moved is None else moved, of_scale, of_zero,
            *shape, float(largest), POSITION=of_position, **constants,
        )  # fmt: skip
    return moved, of_scale, of_zero


def move_triton(
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
    """See `lkq_hf.kernels.grid_positions.move`."""
    grid, shape, constants = _launch(position, scale)
    with torch.cuda.device_of(position):
        _move[grid](
            position, gradient, scale, start, *curvature, *shape, scale.shape[1], float(rate), float(bound),
            float(largest), margin, torch.finfo(torch.float32).tiny, **constants,
        )  # fmt: skip


def _launch(position: Tensor, scale: Tensor) -> tuple[tuple[int], tuple[int, int], dict[str, int]]:
    """Thread blocks, the number and size of groups, and the constants: each program has at most `WEIGHTS`."""
    size = position.shape[1] // scale.shape[1]
    width = next_power_of_2(size)
    groups = WEIGHTS // width
    return (ceil_div(scale.numel(), groups),), (scale.numel(), size), {"GROUPS": groups, "SIZE": width}
