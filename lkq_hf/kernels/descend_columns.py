"""The sequential part of the joint descent: the best integer of one column after another."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import FLOAT32_ONLY, use_triton


def descend_columns_reference(
    residual: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """The definition of `descend_columns`."""
    residual, integers, moved = residual.clone(), integers.clone(), torch.empty_like(residual)
    curvature = hessian.diagonal(dim1=1, dim2=2).unsqueeze(2)
    # An input that is always 0 leaves its integer as it is: none is better than another.
    curvature = torch.where(curvature > 0, curvature, torch.inf)
    for j in range(residual.shape[1]):
        best = torch.addcdiv(integers[:, j], residual[:, j] / curvature[:, j], scale).round_().clamp_(0, largest)
        moved[:, j] = (best - integers[:, j]).mul_(scale)
        integers[:, j] = best
        residual.addcmul_(hessian[:, j].unsqueeze(2), moved[:, j].unsqueeze(1), value=-1)
    return integers, moved


def descend_columns(
    residual: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """Gives each column in turn the integer that minimizes `(t - w^) H (t - w^)^T` with all others fixed.

    That integer is the clamped nearest one to `q_j + g_j / (H_jj s)`, where `g = H (t - w^)` includes the columns that
    have moved before. Rows are independent, and so are the weights of a batch. All tensors are float32, with columns
    before rows.

    Args:
        residual: `g` of these columns, `[batch, columns, rows]`, before any of them moves; at most 128 columns.
        hessian: `[batch, columns, columns]`.
        integers: `[batch, columns, rows]`.
        scale: `[batch, rows]`; all columns are of one group.
        largest: the largest integer.

    Returns:
        The new integers, and the change of the dequantized weights, both `[batch, columns, rows]`.
    """
    if use_triton(residual, dtypes=FLOAT32_ONLY):
        from lkq_hf.kernels.descend_columns_triton import descend_columns_triton

        return descend_columns_triton(residual, hessian, integers, scale, largest)
    return descend_columns_reference(residual, hessian, integers, scale, largest)
