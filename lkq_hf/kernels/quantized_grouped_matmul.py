"""Activations that are sorted by expert times each expert's group-wise quantized weight in the GPTQ layout."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lkq_hf.kernels.dequantize import dequantize, dequantize_reference


def quantized_grouped_matmul_reference(
    x: Tensor, ends: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    """The definition of :func:`quantized_grouped_matmul`."""
    y = x.new_zeros(x.shape[0], qweight.shape[-1])
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            weight = (qweight[expert], qzeros[expert], scales[expert])
            y[start:end] = x[start:end] @ dequantize_reference(*weight, bits, group_size, sym, x.dtype)
    return y


@torch.library.custom_op("lkq_hf::quantized_grouped_matmul", mutates_args=())
def quantized_grouped_matmul(
    x: Tensor, ends: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    """``x[rows of expert e] @ w[e]`` for every expert; differentiable with respect to ``x``.

    One expert's weight at a time is unpacked, and only of experts that have rows.

    Args:
        x: `[rows, in_features]`, floating point, the rows of the first expert first.
        ends: int32 `[experts]`: where each expert's rows end. Rows from the last end on belong to no expert; their
            result is 0.
        qweight: int32 `[experts, in_features * bits / 32, out_features]`.
        qzeros: int32 `[experts, groups, out_features * bits / 32]`; not read when ``sym``.
        scales: float16 `[experts, groups, out_features]`.
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale.
        sym: whether every zero point is ``2**(bits - 1)``.

    Returns:
        `[rows, out_features]` in the dtype of ``x``.
    """
    return _expert_by_expert(x, ends, qweight, qzeros, scales, bits, group_size, sym)


def _expert_by_expert(
    x: Tensor,
    ends: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    transpose: bool = False,
) -> Tensor:
    """The product, or with ``transpose`` that with the transposed weights: `[rows, in_features]`."""
    columns = qweight.shape[1] * 32 // bits if transpose else qweight.shape[2]
    y = x.new_zeros(x.shape[0], columns)
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            weight = dequantize(qweight[expert], qzeros[expert], scales[expert], bits, group_size, sym, x.dtype)
            torch.mm(x[start:end], weight.t() if transpose else weight, out=y[start:end])
    return y


@quantized_grouped_matmul.register_fake
def _(
    x: Tensor, ends: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    return x.new_empty(x.shape[0], qweight.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ends, qweight, qzeros, scales, ctx.bits, ctx.group_size, ctx.sym = inputs
    ctx.save_for_backward(ends, qweight, qzeros, scales)


@torch.library.custom_op("lkq_hf::quantized_grouped_matmul_backward", mutates_args=())
def _input_gradient(
    grad: Tensor, ends: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    return _expert_by_expert(grad, ends, qweight, qzeros, scales, bits, group_size, sym, transpose=True)


@_input_gradient.register_fake
def _(
    grad: Tensor, ends: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    return grad.new_empty(grad.shape[0], qweight.shape[1] * 32 // bits)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad = _input_gradient(grad_output.contiguous(), *ctx.saved_tensors, ctx.bits, ctx.group_size, ctx.sym)
    return (grad, *(None,) * 7)


quantized_grouped_matmul.register_autograd(_backward, setup_context=_setup_context)
