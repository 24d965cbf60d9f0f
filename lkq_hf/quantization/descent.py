"""Joint coordinate descent over integers and scales, after GPTQ."""

import torch
from torch import Tensor

from lkq_hf.kernels.descend_columns import descend_columns
from lkq_hf.quantization.gptq import BLOCK
from lkq_hf.quantization.grid import reconstruct, stored


def joint_descent(
    target: Tensor,
    hessian: Tensor,
    integers: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    sweeps: int = 3,
) -> tuple[Tensor, Tensor]:
    """Lowers `(t - w^) H (t - w^)^T` of every row, one integer or one scale at a time; it never rises.

    With everything else fixed the objective is a parabola in one weight, so its best integer is the clamped nearest
    one to the parabola's vertex `w^ + g / H_jj`, `g = (t - w^) H`; likewise for a group's scale (stage 2). A sweep
    takes group after group: all integers of a group, then its scale, then one product carries the group's change to
    the residuals of all columns.

    Args:
        target: float32 `[out, in]`.
        hessian: float32 `[in, in]`.
        integers: float32 `[out, in]`.
        scales: stored values, float32 `[out, groups]`.
        zeros: float32 `[out, groups]`.

    Returns:
        Integers float32 `[out, in]` and scales (stored values) `[out, groups]`.
    """
    # [column, row] throughout, as in GPTQ: a column of all rows is contiguous.
    residual = hessian @ (target - reconstruct(integers, scales, zeros, group_size)).T
    integers, scales = (t.T.clone(memory_format=torch.contiguous_format) for t in (integers, scales))
    zeros = zeros.T.contiguous()
    for _ in range(sweeps):
        for group, start in enumerate(range(0, hessian.shape[0], group_size)):
            inside = slice(start, start + group_size)
            change = _descend_group(
                residual[inside].clone(), hessian[inside, inside], integers[inside], scales[group], zeros[group], bits
            )
            residual.addmm_(hessian[:, inside], change, alpha=-1)
    return integers.T.contiguous(), scales.T.contiguous()


def _descend_group(
    residual: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """One pass over a group: `integers` `[group_size, rows]` and `scale` `[rows]` are updated in place, and the change
    of the dequantized weights is returned, `[group_size, rows]`."""
    before = (integers - zero) * scale
    columns = hessian.shape[0]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        near = hessian[start:end, start:end].contiguous()
        integers[start:end], moved = descend_columns(
            residual[start:end], near, integers[start:end], scale, 2**bits - 1
        )
        residual[start:end].addmm_(near, moved, alpha=-1)
        residual[:start].addmm_(hessian[:start, start:end], moved, alpha=-1)
        residual[end:].addmm_(hessian[end:, start:end], moved, alpha=-1)

    level = integers - zero
    curvature = (level * (hessian @ level)).sum(0)
    free = curvature > torch.finfo(curvature.dtype).eps * hessian.diagonal().sum()
    wanted = scale + (residual * level).sum(0) / torch.where(free, curvature, 1.0)
    scale.copy_(torch.where(free & (wanted * scale > 0), stored(wanted), scale))
    return level * scale - before
