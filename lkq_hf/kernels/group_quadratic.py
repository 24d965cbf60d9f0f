"""The quadratic form of stage 2: what every pair of a row's groups contributes to its reconstruction error."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import FLOAT32_ONLY, use_triton

TRITON_GROUP_SIZES = (32, 64, 128)


def group_quadratic_reference(levels: Tensor, hessian: Tensor) -> Tensor:
    """The definition of `group_quadratic`."""
    batch, rows, groups, group_size = levels.shape
    quadratic = torch.empty(batch, groups, groups, rows, device=levels.device)
    for i in range(groups):
        product = levels[:, :, i] @ hessian[:, i * group_size : (i + 1) * group_size]
        quadratic[:, i] = (product.view_as(levels) * levels).sum(-1).mT
    return quadratic


def group_quadratic(levels: Tensor, hessian: Tensor) -> Tensor:
    """`A[i, j, row] = v_i H_ij v_j^T` for the levels `v_i` of a row's group `i`, float32
    `[batch, groups, groups, rows]`.

    What one step of a descent over the groups reads is contiguous.

    Args:
        levels: integers minus zero points, whole numbers of magnitude up to 255 in float32,
            `[batch, rows, groups, group_size]`, contiguous.
        hessian: symmetric, float32 `[batch, groups * group_size, groups * group_size]`, contiguous.
    """
    if levels.shape[-1] in TRITON_GROUP_SIZES and use_triton(levels, hessian, dtypes=FLOAT32_ONLY):
        from lkq_hf.kernels.group_quadratic_triton import group_quadratic_triton

        return group_quadratic_triton(levels, hessian)
    return group_quadratic_reference(levels, hessian)
