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
        target: float32 `[batch, out, in]`.
        hessian: float32 `[batch, in, in]`.
        integers: float32 `[batch, out, in]`.
        scales: stored values, float32 `[batch, out, groups]`.
        zeros: float32 `[batch, out, groups]`.

    Returns:
        Integers float32 `[batch, out, in]` and scales (stored values) `[batch, out, groups]`.
    """
    # [column, row] throughout, as in GPTQ: a column of all rows is contiguous.
    residual = hessian @ (target - reconstruct(integers, scales, zeros, group_size)).mT
    integers, scales = (t.mT.clone(memory_format=torch.contiguous_format) for t in (integers, scales))
    zeros = zeros.mT.contiguous()
    for _ in range(sweeps):
        for group, start in enumerate(range(0, hessian.shape[1], group_size)):
            inside = slice(start, start + group_size)
            change = _descend_group(
                residual[:, inside].clone(),
                hessian[:, inside, inside],
                integers[:, inside],
                scales[:, group],
                zeros[:, group],
                bits,
            )
            residual.baddbmm_(hessian[:, :, inside], change, alpha=-1)
    return integers.mT.contiguous(), scales.mT.contiguous()


def _descend_group(
    residual: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """One pass over a group: `integers` `[batch, group_size, rows]` and `scale` `[batch, rows]` are updated in place,
    and the change of the dequantized weights is returned, `[batch, group_size, rows]`."""
    before = (integers - zero.unsqueeze(1)) * scale.unsqueeze(1)
    columns = hessian.shape[1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        integers[:, start:end], moved = descend_columns(
            residual[:, start:end], hessian[:, start:end, start:end], integers[:, start:end], scale, 2**bits - 1
        )
        residual.baddbmm_(hessian[:, :, start:end], moved, alpha=-1)

    level = integers - zero.unsqueeze(1)
    curvature = (level * (hessian @ level)).sum(1)
    free = curvature > torch.finfo(curvature.dtype).eps * hessian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    wanted = scale + (residual * level).sum(1) / torch.where(free, curvature, 1.0)
    scale.copy_(torch.where(free & (wanted * scale > 0), stored(wanted), scale))
    return level * scale.unsqueeze(1) - before
