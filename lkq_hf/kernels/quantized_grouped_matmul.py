"""Activations that are sorted by expert times each expert's group-wise quantized weight in the GPTQ layout."""

from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lkq_hf.kernels.autotune import fastest, run_fastest
from lkq_hf.kernels.dequantize import dequantize, dequantize_reference
from lkq_hf.kernels.dispatch import interpreting, next_power_of_2, use_triton
from lkq_hf.kernels.quantized_matmul import KERNEL_DTYPES, Way

# Most rows and input features of a tile, warps, stages; by the largest number of rows an expert has on average.
_TILES = {
    16: ((16, 128, 4, 5), (16, 128, 4, 3), (16, 128, 8, 3)),
    64: ((16, 128, 4, 5), (32, 128, 4, 4), (64, 128, 4, 4), (64, 128, 8, 3)),
    1 << 30: ((64, 128, 4, 4), (128, 128, 4, 3), (128, 128, 8, 4), (256, 128, 8, 3)),
}


def quantized_grouped_matmul_reference(
    x: Tensor, ends: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    """The definition of `quantized_grouped_matmul`."""
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
            result is undefined.
        qweight: int32 `[experts, in_features * bits / 32, out_features]`.
        qzeros: int32 `[experts, groups, out_features * bits / 32]`; not read when ``sym``.
        scales: float16 `[experts, groups, out_features]`.
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale.
        sym: whether every zero point is ``2**(bits - 1)``.

    Returns:
        `[rows, out_features]` in the dtype of ``x``.
    """
    weights = (ends, qweight, qzeros, scales)
    rows, in_features = x.shape
    if rows == 0 or group_size % 32 or not use_triton(x, scales, dtypes=KERNEL_DTYPES):
        return _expert_by_expert(x, *weights, bits, group_size, sym)
    experts, _, out_features = qweight.shape
    # The number of rows counts in powers of two, so that a growing batch is not tuned again and again.
    key = (x.dtype, x.device, bits, group_size, sym, in_features, out_features, experts, next_power_of_2(rows))
    candidates, plain = ways_to_multiply_grouped(bits, group_size, sym, in_features, experts, next_power_of_2(rows))
    with torch.cuda.device_of(x):
        if not interpreting() and torch.cuda.is_current_stream_capturing():
            # The plain way asks the GPU how many rows each expert has, which a graph cannot.
            way = fastest(key, candidates, plain)
            return (candidates[0] if way is None or way is plain else way)(x.contiguous(), *weights)
        return run_fastest(key, candidates, plain, x.contiguous(), weights)


@cache  # every product asks
def ways_to_multiply_grouped(
    bits: int, group_size: int, sym: bool, in_features: int, experts: int, bucket: int
) -> tuple[list[Way], Way]:
    """Every tile worth trying for up to ``bucket`` rows, and plain torch."""
    from lkq_hf.kernels.quantized_gemm_triton import quantized_grouped_gemm, tile_features

    weight_format: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym}
    tiles = _TILES[min(most for most in _TILES if bucket <= most * experts)]
    ways: list[Way] = [
        partial(
            quantized_grouped_gemm,
            **weight_format,
            block_m=block_m,
            block_k=tile_features(most_features, in_features, group_size),
            num_warps=num_warps,
            num_stages=num_stages,
        )
        for block_m, most_features, num_warps, num_stages in tiles
    ]
    return ways, partial(_expert_by_expert, **weight_format)


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
