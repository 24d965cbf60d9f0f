"""Activations times a group-wise quantised weight in the GPTQ layout."""

from typing import Any

import torch
from torch import Tensor

from lkq_hf.kernels.dequantize import dequantize, dequantize_reference


def quantized_matmul_reference(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    """The definition of :func:`quantized_matmul`."""
    return x @ dequantize_reference(qweight, qzeros, scales, bits, group_size, sym, x.dtype)


@torch.library.custom_op("lkq_hf::quantized_matmul", mutates_args=())
def quantized_matmul(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    """``x @ w`` for the packed weight ``w``, with float32 accumulation; differentiable with respect to ``x``.

    Args:
        x: `[..., in_features]`, floating point.
        qweight: int32 `[in_features * bits / 32, out_features]`.
        qzeros: int32 `[groups, out_features * bits / 32]`; not read when ``sym``.
        scales: float16 `[groups, out_features]`.
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale.
        sym: whether every zero point is ``2**(bits - 1)``.

    Returns:
        `[..., out_features]` in the dtype of ``x``.
    """
    return quantized_matmul_reference(x, qweight, qzeros, scales, bits, group_size, sym)


@quantized_matmul.register_fake
def _(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, qzeros, scales, ctx.bits, ctx.group_size, ctx.sym = inputs
    ctx.save_for_backward(qweight, qzeros, scales)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    # The weight is dequantised again rather than kept: one layer's weight at a time is in memory.
    qweight, qzeros, scales = ctx.saved_tensors
    weight = dequantize(qweight, qzeros, scales, ctx.bits, ctx.group_size, ctx.sym, grad_output.dtype)
    return grad_output @ weight.t(), None, None, None, None, None, None


quantized_matmul.register_autograd(_backward, setup_context=_setup_context)
