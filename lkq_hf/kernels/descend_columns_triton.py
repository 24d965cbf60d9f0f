"""Triton kernel of `lkq_hf.kernels.descend_columns`, built like that of `lkq_hf.kernels.round_columns`."""

import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.round_columns_triton import launch_on_columns, nearest


@triton.jit
def _descend_columns(
    residual, hessian, integers, scale, best, moved, rows, columns, largest, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    size = tl.program_id(1).to(tl.int64) * columns * rows
    residual += size
    integers += size
    best += size
    moved += size
    hessian += tl.program_id(1).to(tl.int64) * columns * columns
    scale += tl.program_id(1).to(tl.int64) * rows
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    offsets = column[:, None] * rows + row[None, :]
    work = tl.load(residual + offsets, mask=(column < columns)[:, None] & inside[None, :], other=0.0)
    s = tl.load(scale + row, mask=inside, other=1.0)
    for j in range(columns):
        curvature = tl.load(hessian + j * columns + j)
        gradient = tl.sum(tl.where(column[:, None] == j, work, 0.0), axis=0)
        old = tl.load(integers + j * rows + row, mask=inside, other=0.0)
        exact = old + tl.div_rn(tl.div_rn(gradient, tl.where(curvature > 0, curvature, 1.0)), s)
        new = tl.minimum(tl.maximum(nearest(tl.minimum(tl.maximum(exact, -1.0), largest + 1.0)), 0.0), largest)
        new = tl.where(curvature > 0, new, old)
        change = (new - old) * s
        tl.store(best + j * rows + row, new, mask=inside)
        tl.store(moved + j * rows + row, change, mask=inside)
        pull = tl.load(hessian + j * columns + column, mask=column < columns, other=0.0)
        work -= pull[:, None] * change[None, :]


def descend_columns_triton(
    residual: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """See `lkq_hf.kernels.descend_columns.descend_columns`."""
    return launch_on_columns(_descend_columns, residual, hessian, integers, scale, largest=largest)
