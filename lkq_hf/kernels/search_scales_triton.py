"""Triton kernel of stage 1's search (`lkq_hf.quantization.stage1`).

The torch search writes an error matrix for every candidate. Here a program keeps one group of some rows of a weight,
and the group's Hessian block, on the chip while it tries all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div
from lkq_hf.kernels.round_columns_triton import nearest

GROUP_SIZES = (32, 64, 128)
"""Group sizes that the kernel takes."""


@triton.jit
def _stored(scale):
    """A scale as float16 stores it, inside the positive range of float16."""
    return tl.minimum(tl.maximum(scale, 5.9604644775390625e-08), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _loss(weight, block, scale, zero, largest):
    level = nearest(tl.minimum(tl.maximum(tl.div_rn(weight, scale[:, None]), -largest - 1.0), largest + 1.0))
    level = tl.minimum(tl.maximum(level, -zero[:, None]), largest - zero[:, None])
    error = level * scale[:, None] - weight
    # Single TF32 products would lose the difference between neighboring candidates; three keep that of float32.
    return tl.sum(tl.dot(error, block, input_precision="tf32x3") * error, 1)


@triton.jit
def _search_kernel(
    weight,
    blocks,
    scales,
    zeros,
    rows,
    columns,
    largest,
    smallest_shrink,
    coarse_step,
    SYM: tl.constexpr,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    group = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, GROUP)
    # Of the rows of all weights.
    whole_row = tl.program_id(2).to(tl.int64) * rows + row
    groups = columns // GROUP
    offsets = whole_row[:, None] * columns + group * GROUP + column[None, :]
    w = tl.load(weight + offsets, mask=inside[:, None], other=0.0)
    square = blocks + (tl.program_id(2).to(tl.int64) * groups + group) * GROUP * GROUP
    block = tl.load(square + column[:, None] * GROUP + column[None, :])
    low = tl.minimum(tl.min(w, 1), 0.0)
    high = tl.maximum(tl.max(w, 1), 0.0)
    if SYM:
        high = tl.maximum(-low, high)
        low = -high

    best = tl.full((ROWS,), float("inf"), tl.float32)
    best_scale = tl.full((ROWS,), 1.0, tl.float32)
    best_zero = tl.zeros((ROWS,), tl.float32)
    best_shrink = tl.full((ROWS,), 100.0, tl.float32)
    # A tensor of its own: Triton does not carry a name through a loop that is another one's tensor before it.
    coarse = tl.full((ROWS,), 100.0, tl.float32)
    for step in range(COARSE + FINE):
        if step == COARSE:
            coarse = best_shrink
        if step < COARSE:
            shrink = tl.full((ROWS,), 100.0, tl.float32) - step * coarse_step
        else:
            # ..., -2, -1, 1, 2, ...
            offset = step - COARSE - FINE // 2
            offset = tl.where(offset >= 0, offset + 1, offset)
            shrink = tl.minimum(tl.maximum(coarse + offset, smallest_shrink), 100.0)
        bottom = tl.div_rn(low * shrink, 100.0)
        span = tl.div_rn(high * shrink, 100.0) - bottom
        scale = _stored(tl.where(span > 0, tl.div_rn(span, largest), 1.0))
        if SYM:
            zero = tl.zeros((ROWS,), tl.float32) + (largest + 1) / 2
            loss = _loss(w, block, scale, zero, largest)
            negative_loss = _loss(w, block, -scale, zero, largest)
            scale = tl.where(negative_loss < loss, -scale, scale)
            loss = tl.minimum(negative_loss, loss)
        else:
            exact = tl.div_rn(-bottom, scale)
            zero = tl.minimum(tl.maximum(tl.floor(exact), 0.0), largest)
            upper = tl.minimum(tl.maximum(tl.ceil(exact), 0.0), largest)
            loss = _loss(w, block, scale, zero, largest)
            upper_loss = _loss(w, block, scale, upper, largest)
            zero = tl.where(upper_loss < loss, upper, zero)
            loss = tl.minimum(upper_loss, loss)
        better = loss < best
        best = tl.where(better, loss, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
        best_shrink = tl.where(better, shrink, best_shrink)
    target = whole_row * groups + group
    tl.store(scales + target, best_scale, mask=inside)
    tl.store(zeros + target, best_zero, mask=inside)


def search_scales_triton(
    weight: Tensor, blocks: Tensor, bits: int, sym: bool, smallest_shrink: int, coarse_step: int
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 `[batch, out, groups]`.

    Args:
        weight: float32 `[batch, out, in]`, contiguous.
        blocks: diagonal blocks of the Hessian, float32 `[batch, groups, group_size, group_size]`, contiguous.
        bits: bits per weight.
        sym: zero point fixed at `2**(bits - 1)`; scales of both signs are tried.
        smallest_shrink: per cent of the range that the narrowest candidate keeps.
        coarse_step: per cent between the first candidates; then all whole per cents around the best are tried.
    """
    batch, rows, columns = weight.shape
    _, groups, group_size, _ = blocks.shape
    scales = torch.empty(batch, rows, groups, device=weight.device)
    zeros = torch.empty_like(scales)
    tile = 64
    with torch.cuda.device_of(weight):
        _search_kernel[(groups, ceil_div(rows, tile), batch)](
            weight,
            blocks,
            scales,
            zeros,
            rows,
            columns,
            float(2**bits - 1),
            float(smallest_shrink),
            float(coarse_step),
            SYM=sym,
            COARSE=(100 - smallest_shrink) // coarse_step + 1,
            FINE=coarse_step // 2 * 2,
            GROUP=group_size,
            ROWS=tile,
            num_warps=4,
        )
    return scales, zeros
