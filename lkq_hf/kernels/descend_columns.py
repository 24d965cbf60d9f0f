"""The sequential part of the joint descent: the best integer of one column after another."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import FLOAT32_ONLY, use_triton


def descend_columns_reference(
    residual: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """The definition of `descend_columns`."""
    residual, integers, moved = residual.clone(), integers.clone(), torch.zeros_like(residual)
    for j, curvature in enumerate(hessian.diagonal().tolist()):
        if curvature <= 0:  # an input that is always 0: no integer is better than another
            continue
        best = torch.addcdiv(integers[j], residual[j] / curvature, scale).round_().clamp_(0, largest)
        torch.sub(best, integers[j], out=moved[j]).mul_(scale)
        integers[j] = best
        residual.addr_(hessian[j], moved[j], alpha=-1)
    return integers, moved


def descend_columns(
    residual: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """Gives each column in turn the integer that minimizes `(t - w^) H (t - w^)^T` with all others fixed.

    That integer is the clamped nearest one to `q_j + g_j / (H_jj s)`, where `g = H (t - w^)` includes the columns that
    have moved before. Rows are independent. All tensors are float32 and contiguous, with columns first.

    Args:
        residual: `g` of these columns, `[columns, rows]`, before any of them moves; at most 128 columns.
        hessian: `[columns, columns]`.
        integers: `[columns, rows]`.
        scale: `[rows]`; all columns are of one group.
        largest: the largest integer.

    Returns:
        The new integers, and the change of the dequantized weights, both `[columns, rows]`.
    """
    if use_triton(residual, dtypes=FLOAT32_ONLY):
        from lkq_hf.kernels.descend_columns_triton import descend_columns_triton

        return descend_columns_triton(residual, hessian, integers, scale, largest)
    return descend_columns_reference(residual, hessian, integers, scale, largest)
