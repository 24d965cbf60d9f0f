"""From the packed GPTQ layout to a floating-point weight."""

import torch
from torch import Tensor

from lkq_hf.kernels.bit_stream import unpack
from lkq_hf.kernels.dispatch import use_triton


def dequantize_reference(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool, dtype: torch.dtype
) -> Tensor:
    """The definition of `dequantize`."""
    integers = unpack(qweight.t(), bits)
    levels = integers.unflatten(-1, (-1, group_size))
    if sym:
        levels = levels - 2 ** (bits - 1)
    else:
        levels = levels - unpack(qzeros, bits).t().unsqueeze(-1)
    return (scales.t().float().unsqueeze(-1) * levels).to(dtype).flatten(-2).t()


# An operator of its own, so that a compiler does not trace into the kernel where a backward pass calls it.
@torch.library.custom_op("lkq_hf::dequantize", mutates_args=())
def dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool, dtype: torch.dtype
) -> Tensor:
    """The weight `[in_features, out_features]` of a packed Linear, computed in float32 and rounded once to ``dtype``.

    Args:
        qweight: int32 `[in_features * bits / 32, out_features]`.
        qzeros: int32 `[groups, out_features * bits / 32]`; not read when ``sym``.
        scales: float16 `[groups, out_features]`.
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale.
        sym: whether every zero point is ``2**(bits - 1)``.
        dtype: of the result.
    """
    if _use_triton(qweight, qzeros, scales, group_size):
        from lkq_hf.kernels.dequantize_triton import dequantize_triton

        return dequantize_triton(qweight, qzeros, scales, bits, group_size, sym, dtype)
    return dequantize_reference(qweight, qzeros, scales, bits, group_size, sym, dtype)


@dequantize.register_fake
def _(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool, dtype: torch.dtype
) -> Tensor:
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    if _use_triton(qweight, qzeros, scales, group_size):
        return qweight.new_empty((in_features, out_features), dtype=dtype)
    return qweight.new_empty((out_features, in_features), dtype=dtype).t()


def _use_triton(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> bool:
    return group_size % 32 == 0 and use_triton(qweight, qzeros, scales)
