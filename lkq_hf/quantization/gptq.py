"""GPTQ: rounds one input column after another and moves each rounding error onto the columns not yet rounded."""

import torch
from torch import Tensor

from lkq_hf.kernels.round_columns import round_columns

# Columns whose updates to later columns are gathered into one matrix product.
BLOCK = 128


def group_aware_order(diagonal: Tensor, group_size: int) -> Tensor:
    """The order in which columns are quantized: important inputs first, without splitting a group.

    Args:
        diagonal: `diag(H)`, `[batch, in]`.

    Returns:
        int64 `[batch, in]`: groups by their largest diagonal entry, columns inside a group by theirs, both descending.
    """
    grouped = diagonal.unflatten(1, (-1, group_size))
    inside = grouped.argsort(dim=2, descending=True, stable=True)
    inside += torch.arange(grouped.shape[1], device=diagonal.device).unsqueeze(1) * group_size
    groups = grouped.amax(2).argsort(dim=1, descending=True, stable=True)
    return inside.gather(1, groups.unsqueeze(2).expand_as(inside)).flatten(1)


def costliest_first_order(factor: Tensor) -> Tensor:
    """The order in which columns are quantized: first those whose error the others can make up for least.

    With all other columns free to compensate, an error `e` in column `j` costs `e^2 / [H^-1]_jj`. The costs that
    GPTQ meets, each with fewer columns left than the one before, multiply to `det H` in any order; taking the
    columns that stay costly at the end, where nothing is left to compensate, first keeps their sum small.

    Args:
        factor: upper triangular `U` with `H^-1 = U^T U`, `[batch, in, in]`, in the stored order.

    Returns:
        int64 `[batch, in]`.
    """
    return factor.square().sum(1).argsort(stable=True)


def reordered(weight: Tensor, order: Tensor) -> Tensor:
    """The columns of weights `[batch, out, in]` that `order`, int64 `[batch, columns]`, names for each of them."""
    return weight.gather(2, order.unsqueeze(1).expand(-1, weight.shape[1], -1))


def gptq(
    target: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    order: Tensor,
) -> Tensor:
    """Integers that approximately minimize `(t - w^) H (t - w^)^T` for every row on a fixed grid (arXiv 2210.17323).

    Args:
        target: the weight to approximate, float32 `[batch, out, in]`.
        factor: upper triangular `U`, float32 `[batch, in, in]`, with `H^-1 = U^T U`; rows and columns already in
            `order`.
        scales: `[batch, out, groups]`, the stored values.
        zeros: `[batch, out, groups]`.
        order: int64 `[batch, in]`, the order in which columns are quantized.

    Returns:
        Integers in `0 .. 2**bits - 1`, float32 `[batch, out, in]`, columns in the stored order.
    """
    columns = target.shape[2]
    group_of = order // group_size
    # Everything is kept as [column, row]: one column of all rows is then contiguous.
    work = reordered(target, order).mT.contiguous()
    # Rows divided by their diagonal: the update of later columns then needs no division in the loop.
    unit = factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(2)
    integers = torch.empty_like(work)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        scale, zero = (reordered(each, group_of[:, start:end]).mT for each in (scales, zeros))
        integers[:, start:end], errors = round_columns(
            work[:, start:end], scale, zero, unit[:, start:end, start:end], 2**bits - 1
        )
        if end < columns:
            work[:, end:].baddbmm_(unit[:, start:end, end:].mT, errors, alpha=-1)
    return reordered(integers.mT, order.argsort(1))
