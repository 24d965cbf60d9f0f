"""The sequential part of GPTQ: one block of columns, each rounded and its error moved onto the later ones."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import FLOAT32_ONLY, use_triton


def round_columns_reference(
    block: Tensor, scale: Tensor, zero: Tensor, unit: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """The definition of `round_columns`."""
    block = block.clone()
    integers, errors = torch.empty_like(block), torch.empty_like(block)
    for j in range(block.shape[1]):
        exact = torch.addcdiv(zero[:, j], block[:, j], scale[:, j])
        integers[:, j] = exact.round().clamp_(0, largest)
        errors[:, j] = (exact - integers[:, j]).mul_(scale[:, j])
        block[:, j + 1 :].addcmul_(unit[:, j, j + 1 :].unsqueeze(2), errors[:, j].unsqueeze(1), value=-1)
    return integers, errors


def round_columns(block: Tensor, scale: Tensor, zero: Tensor, unit: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Rounds a block's columns one after another: ``e_j = w_j - w^_j``, then ``w_k -= unit[j, k] e_j`` for ``k > j``.

    Rows are independent, and so are the weights of a batch. All tensors are float32, with columns before rows.

    Args:
        block: `[batch, columns, rows]`, the weights as earlier blocks left them; at most 128 columns.
        scale: `[batch, columns, rows]`, each column's scales.
        zero: `[batch, columns, rows]`, each column's zero points.
        unit: `[batch, columns, columns]`, upper triangular with a unit diagonal.
        largest: the largest integer.

    Returns:
        Integers in `0 .. largest` and the errors `e`, both `[batch, columns, rows]`.
    """
    if use_triton(block, dtypes=FLOAT32_ONLY):
        from lkq_hf.kernels.round_columns_triton import round_columns_triton

        return round_columns_triton(block, scale, zero, unit, largest)
    return round_columns_reference(block, scale, zero, unit, largest)
