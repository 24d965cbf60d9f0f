"""Triton kernel of `lkq_hf.kernels.group_quadratic`.

Levels are exact in bfloat16, and three bfloat16 numbers hold a float32, so that tensor cores compute the products at
full float32 precision. The form is symmetric: one half is computed, both are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, interpreting


@triton.jit
def _group_quadratic_kernel(
    levels, hessian, quadratic, rows, groups, GROUP: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr
):
    i = groups - 1 - tl.program_id(0)  # the longest loops first
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, GROUP)
    columns = groups * GROUP
    tile = levels + (batch * rows + row)[:, None] * columns + column[None, :]
    own = tl.load(tile + i * GROUP, mask=inside[:, None], other=0.0).to(PIECE)
    square = hessian + (batch * columns + i * GROUP + column)[:, None] * columns + column[None, :]
    out = quadratic + batch * groups * groups * rows + row
    for j in range(0, i + 1):
        block = tl.load(square + j * GROUP)
        other = tl.load(tile + j * GROUP, mask=inside[:, None], other=0.0)
        first = block.to(PIECE)
        rest = block - first.to(tl.float32)
        second = rest.to(PIECE)
        third = (rest - second.to(tl.float32)).to(PIECE)
        product = tl.dot(own, third)
        product = tl.dot(own, second, product)
        product = tl.dot(own, first, product)
        value = tl.sum(product * other, 1)
        tl.store(out + (tl.cast(i, tl.int64) * groups + j) * rows, value, mask=inside)
        tl.store(out + (tl.cast(j, tl.int64) * groups + i) * rows, value, mask=inside)


def group_quadratic_triton(levels: Tensor, hessian: Tensor) -> Tensor:
    """See `lkq_hf.kernels.group_quadratic.group_quadratic`."""
    batch, rows, groups, group_size = levels.shape
    quadratic = torch.empty(batch, groups, groups, rows, device=levels.device)
    tile = 64
    with torch.cuda.device_of(levels):
        _group_quadratic_kernel[(groups, ceil_div(rows, tile), batch)](
            levels,
            hessian,
            quadratic,
            rows,
            groups,
            GROUP=group_size,
            ROWS=tile,
            PIECE=tl.float32 if interpreting() else tl.bfloat16,  # the interpreter's dot takes no bfloat16
            num_warps=4,
            num_stages=2,
        )
    return quadratic
