"""Triton kernel of `lkq_hf.kernels.round_columns`.

The torch loop launches half a dozen kernels a column. Here a program keeps all columns of a few rows of one weight on
the chip and walks through them without leaving it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, next_power_of_2

ROWS = 16


@triton.jit
def nearest(x):
    """Rounds to the nearest integer, ties to even, for magnitudes under 2**22: where float32 has no fraction left."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_columns(
    block, scale, zero, unit, integers, errors, rows, columns, largest, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    size = tl.program_id(1).to(tl.int64) * columns * rows
    block += size
    scale += size
    zero += size
    integers += size
    errors += size
    unit += tl.program_id(1).to(tl.int64) * columns * columns
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    offsets = column[:, None] * rows + row[None, :]
    work = tl.load(block + offsets, mask=(column < columns)[:, None] & inside[None, :], other=0.0)
    for j in range(columns):
        value = tl.sum(tl.where(column[:, None] == j, work, 0.0), axis=0)
        s = tl.load(scale + j * rows + row, mask=inside, other=1.0)
        z = tl.load(zero + j * rows + row, mask=inside, other=0.0)
        # Clamped to one step outside the grid first: the same integer, and small enough to be rounded by an addition.
        exact = z + tl.div_rn(value, s)
        integer = tl.minimum(tl.maximum(nearest(tl.minimum(tl.maximum(exact, -1.0), largest + 1.0)), 0.0), largest)
        error = (exact - integer) * s
        tl.store(integers + j * rows + row, integer, mask=inside)
        tl.store(errors + j * rows + row, error, mask=inside)
        later = tl.load(unit + j * columns + column, mask=(column > j) & (column < columns), other=0.0)
        work -= later[:, None] * error[None, :]


def round_columns_triton(
    block: Tensor, scale: Tensor, zero: Tensor, unit: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """See `lkq_hf.kernels.round_columns.round_columns`."""
    return launch_on_columns(_round_columns, block, scale, zero, unit, largest=largest)


def launch_on_columns(kernel: Any, first: Tensor, *others: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Launches a kernel that walks through columns, each program with all columns of `ROWS` rows of one weight.

    Args:
        kernel: takes the tensors, its two results, the numbers of rows and of columns, and ``largest``.
        first: float32 `[batch, columns, rows]`, as the results are.
        others: further tensors.
        largest: integer of the grid.
    """
    batch, columns, rows = first.shape
    inputs = [tensor.contiguous() for tensor in (first, *others)]
    results = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    with torch.cuda.device_of(first):
        kernel[(ceil_div(rows, ROWS), batch)](
            *inputs, *results, rows, columns, float(largest), COLUMNS=max(16, next_power_of_2(columns)), ROWS=ROWS
        )
    return results
