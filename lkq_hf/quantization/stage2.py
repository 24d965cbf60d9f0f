"""Stage 2: group scales refined after GPTQ, integers frozen (arXiv 2602.02126)."""

import torch
from torch import Tensor

from lkq_hf.kernels.group_quadratic import group_quadratic
from lkq_hf.quantization.grid import levels, stored

# Floats of the quadratic form kept at once; more rows than fit are refined piece by piece.
PIECE = 1 << 28


def refine_scales(
    target: Tensor, hessian: Tensor, integers: Tensor, scales: Tensor, zeros: Tensor, group_size: int, sweeps: int = 1
) -> Tensor:
    """Coordinate descent over the scales of each row, in closed form.

    With `v_i = q_i - z_i` the objective `(t - w^) H (t - w^)^T` is `s^T A s - 2 b^T s + const`, where
    `A[i, j] = v_i H_ij v_j^T` and `b[i] = [t H]_i v_i^T`. One sweep minimizes it exactly over one scale after another.
    Each scale is rounded to its stored value before the next one is fitted, so later groups absorb the rounding, and
    since a group's current scale is a stored value too, the nearest stored value to the optimum never raises the
    objective.

    Args:
        target: float32 `[batch, out, in]`; with the deviation term, `t = w + alpha w R H^-1`.
        hessian: float32 `[batch, in, in]`.
        integers: float32 `[batch, out, in]`.
        scales: stored values, float32 `[batch, out, groups]`.
        zeros: float32 `[batch, out, groups]`.

    Returns:
        Scales (stored values), float32 `[batch, out, groups]`: a row whose objective did not fall keeps its old ones.
    """
    batch, _, groups = scales.shape
    rows = max(1, PIECE // (batch * (groups * groups + 2 * target.shape[2])))
    pieces = zip(*(each.split(rows, 1) for each in (target, integers, scales, zeros)), strict=True)
    return torch.cat([_refine(t, hessian, q, s, z, group_size, sweeps) for t, q, s, z in pieces], 1)


def _refine(
    target: Tensor, hessian: Tensor, integers: Tensor, scales: Tensor, zeros: Tensor, group_size: int, sweeps: int
) -> Tensor:
    level = levels(integers, zeros, group_size)
    groups = level.shape[2]
    linear = ((target @ hessian).view_as(level) * level).sum(-1)
    quadratic = group_quadratic(level, hessian)
    own = quadratic.diagonal(dim1=1, dim2=2).mT.contiguous()  # [batch, groups, rows]
    # A group whose levels are all 0, or see no input, leaves its scale undetermined.
    free = own > torch.finfo(own.dtype).eps * own.amax(1, keepdim=True)
    step = torch.where(free, 1 / torch.where(free, own, 1.0), 0.0)

    current = scales.mT.contiguous()
    residual = linear.mT - torch.einsum("bijr,bjr->bir", quadratic, current)
    start = residual.clone()
    for _ in range(sweeps):
        for i in range(groups):
            old = current[:, i]
            wanted = torch.addcmul(old, residual[:, i], step[:, i])
            new = torch.where((wanted * old > 0) & free[:, i], stored(wanted), old)
            residual.addcmul_(quadratic[:, i], (new - old).unsqueeze(1), value=-1)
            current[:, i] = new
    # f(s) - f(s_old) = -(s - s_old)^T (r_old + r): positive gain means that the objective fell.
    gain = ((current - scales.mT) * (start + residual)).sum(1)
    return torch.where((gain > 0).unsqueeze(2), current.mT, scales)
