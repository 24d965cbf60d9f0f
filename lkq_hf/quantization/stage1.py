"""Stage 1: group scales chosen before GPTQ by what they do to the layer's output (arXiv 2602.02126)."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import FLOAT32_ONLY, use_triton
from lkq_hf.quantization.grid import group_range, scales_of_range, symmetric_range

SMALLEST_SHRINK = 20  # per cent of the group's range
COARSE_STEP = 5
# Rows are searched in pieces of this many weights: few enough to stay in a GPU's second-level cache over a search.
PIECE = 1 << 22


def search_scales(
    weight: Tensor, bits: int, group_size: int, sym: bool, hessian: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Searches scale and zero point of every row and group over shrunken ranges `p * (min, max)`.

    Minimizes `(w^ - w) H_gg (w^ - w)^T` per row and group over `p = 1.00, 0.99 ... 0.20`, first in steps of 0.05 and
    then of 0.01 around the best; an asymmetric zero point is tried rounded down and rounded up, a symmetric grid with
    a positive and a negative scale: it has one level more below its zero point than above, and the sign says which end
    of the weights gets it. `p = 1` is among the candidates, so the result is never worse than the minimum-maximum grid
    by this measure.

    Args:
        weight: float32 `[batch, out, in]`.
        bits: bits per weight.
        group_size: divides `in`.
        sym: zero point fixed at `2**(bits - 1)`.
        hessian: float32 `[batch, in, in]`; `None` weighs all errors alike (the mean-squared-error search of plain
            GPTQ).

    Returns:
        Scales (stored values) and zero points, both float32 `[batch, out, groups]`.
    """
    blocks = None
    if hessian is not None:
        grouped = hessian.unflatten(2, (-1, group_size)).unflatten(1, (-1, group_size))
        blocks = grouped.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
        if use_triton(weight, dtypes=FLOAT32_ONLY):
            from lkq_hf.kernels.search_scales_triton import GROUP_SIZES, search_scales_triton

            if group_size in GROUP_SIZES:
                return search_scales_triton(weight.contiguous(), blocks, bits, sym, SMALLEST_SHRINK, COARSE_STEP)
    pieces = weight.split(max(1, PIECE // (len(weight) * weight.shape[2])), dim=1)
    found = [_search(piece, bits, group_size, sym, blocks) for piece in pieces]
    return torch.cat([scales for scales, _ in found], 1), torch.cat([zeros for _, zeros in found], 1)


def _search(weight: Tensor, bits: int, group_size: int, sym: bool, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    largest = 2**bits - 1
    # [batch, groups, rows, ...] so that each group's errors meet its Hessian block in one batched product.
    low, high = (edge.mT.contiguous() for edge in group_range(weight, group_size))
    if sym:
        low, high = symmetric_range(low, high)
    minus = weight.unflatten(2, (-1, group_size)).transpose(1, 2).neg()

    def loss(scales: Tensor, zeros: Tensor) -> Tensor:
        scale, zero = scales.unsqueeze(-1), zeros.unsqueeze(-1)
        level = (minus / -scale).round_().clamp_(-zero, largest - zero)
        error = torch.addcmul(minus, level, scale)
        if blocks is None:
            return error.square_().sum(-1)
        return torch.matmul(error, blocks).mul_(error).sum(-1)

    best = torch.full_like(low, torch.inf)
    best_scales, best_zeros, best_shrink = torch.ones_like(low), torch.zeros_like(low), torch.full_like(low, 100.0)

    def consider(shrink: Tensor) -> None:
        nonlocal best, best_scales, best_zeros, best_shrink
        scales = scales_of_range(low * shrink / 100, high * shrink / 100, bits)
        if sym:
            middle = torch.full_like(low, 2 ** (bits - 1))
            candidates = [(scales, middle), (-scales, middle)]
        else:
            zero = -low * shrink / 100 / scales
            candidates = [(scales, zero.floor().clamp_(0, largest)), (scales, zero.ceil().clamp_(0, largest))]
        for signed, zeros in candidates:
            value = loss(signed, zeros)
            better = value < best
            best = torch.where(better, value, best)
            best_scales = torch.where(better, signed, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
            best_shrink = torch.where(better, shrink, best_shrink)

    for percent in range(100, SMALLEST_SHRINK - 1, -COARSE_STEP):
        consider(torch.full_like(low, percent))
    coarse = best_shrink
    half = COARSE_STEP // 2
    for offset in (o for o in range(-half, half + 1) if o):
        consider((coarse + offset).clamp(SMALLEST_SHRINK, 100))
    return best_scales.mT.contiguous(), best_zeros.mT.contiguous()
