"""GPTQ: rounds one input column after another and moves each rounding error onto the columns not yet rounded."""

import torch
from torch import Tensor

from lkq_hf.kernels.round_columns import round_columns

# Columns whose updates to later columns are gathered into one matrix product.
BLOCK = 128


def group_aware_order(diagonal: Tensor, group_size: int) -> Tensor:
    """The order in which columns are quantized: important inputs first, without splitting a group.

    Args:
        diagonal: `diag(H)`, `[in]`.

    Returns:
        int64 `[in]`: groups by their largest diagonal entry, columns inside a group by theirs, both descending.
    """
    grouped = diagonal.view(-1, group_size)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    groups = grouped.amax(1).argsort(descending=True, stable=True)
    return (inside + torch.arange(grouped.shape[0], device=diagonal.device).unsqueeze(1) * group_size)[groups].view(-1)


def costliest_first_order(factor: Tensor) -> Tensor:
    """The order in which columns are quantized: first those whose error the others can make up for least.

    With all other columns free to compensate, an error `e` in column `j` costs `e^2 / [H^-1]_jj`. The costs that
    GPTQ meets, each with fewer columns left than the one before, multiply to `det H` in any order; taking the
    columns that stay costly at the end, where nothing is left to compensate, first keeps their sum small.

    Args:
        factor: upper triangular `U` with `H^-1 = U^T U`, `[in, in]`, in the stored order.

    Returns:
        int64 `[in]`.
    """
    return factor.square().sum(0).argsort(stable=True)


def gptq(
    target: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    order: Tensor | None = None,
) -> Tensor:
    """Integers that approximately minimize `(t - w^) H (t - w^)^T` for every row on a fixed grid (arXiv 2210.17323).

    Args:
        target: the weight to approximate, float32 `[out, in]`.
        factor: upper triangular `U`, float32 `[in, in]`, with `H^-1 = U^T U`; rows and columns already in `order`.
        scales: `[out, groups]`, the stored values.
        zeros: `[out, groups]`.
        order: int64 `[in]`, the order in which columns are quantized; `None` for the stored order.

    Returns:
        Integers in `0 .. 2**bits - 1`, float32 `[out, in]`, columns in the stored order.
    """
    columns = target.shape[1]
    if order is None:
        order = torch.arange(columns, device=target.device)
    group_of = order // group_size
    # Everything is kept as [column, row]: one column of all rows is then contiguous.
    work = target.T[order]
    scale, zero = scales.T.contiguous(), zeros.T.contiguous()
    # Rows divided by their diagonal: the update of later columns then needs no division in the loop.
    unit = factor / factor.diagonal().unsqueeze(1)
    integers = torch.empty_like(work)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        groups = group_of[start:end]
        integers[start:end], errors = round_columns(
            work[start:end], scale[groups], zero[groups], unit[start:end, start:end].contiguous(), 2**bits - 1
        )
        if end < columns:
            work[end:].addmm_(unit[start:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(integers)
    result[order] = integers
    return result.T.contiguous()
