"""The grid of a group: scales and zero points from minima and maxima, in the dtype in which they are stored."""

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16
# The smallest positive and the largest finite float16: magnitudes outside would be stored as 0 or infinity.
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = torch.finfo(SCALE_DTYPE).max


def stored(scales: Tensor) -> Tensor:
    """Scales rounded to the stored float16 and kept inside its range, as float32. Signs stay; 0 counts as positive."""
    return scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).to(SCALE_DTYPE).float().copysign(scales)


def group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, widened to contain 0: two tensors `[..., out, groups]`."""
    grouped = weight.unflatten(-1, (-1, group_size))
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def symmetric_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range that has the same extent on both sides of 0."""
    largest = torch.maximum(-low, high)
    return -largest, largest


def scales_of_range(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Stored scales of the ranges `low .. high`, any shape. An empty range (all weights 0) has scale 1."""
    span = high - low
    return stored(torch.where(span > 0, span / (2**bits - 1), torch.ones_like(span)))


def minmax_grid(weight: Tensor, bits: int, group_size: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points, both float32 `[..., out, groups]`, that span each group's minimum and maximum."""
    low, high = group_range(weight, group_size)
    if sym:
        low, high = symmetric_range(low, high)
    scales = scales_of_range(low, high, bits)
    if sym:
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    return scales, (-low / scales).round().clamp(0, 2**bits - 1)


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> Tensor:
    """Round-to-nearest integers, float32 `[..., out, in]`."""
    grouped = weight.unflatten(-1, (-1, group_size))
    integers = (grouped / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return integers.flatten(-2)


def levels(integers: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """`V`, integers minus zero points, `[..., out, groups, group_size]`."""
    return integers.unflatten(-1, (-1, group_size)) - zeros.unsqueeze(-1)


def reconstruct(integers: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """The dequantized weight `[..., out, in]`."""
    return (levels(integers, zeros, group_size) * scales.unsqueeze(-1)).flatten(-2)
