"""Activations times a group-wise quantized weight in the GPTQ layout."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lkq_hf.kernels.autotune import run_fastest
from lkq_hf.kernels.dequantize import dequantize, dequantize_reference
from lkq_hf.kernels.dispatch import ceil_div, multiprocessors, next_power_of_2, use_triton
from lkq_hf.kernels.int4_cpu import fits_int4, int4_matmul
from lkq_hf.kernels.launch import operator

KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16})

# From here on the arithmetic is long enough to hide writing the weight once in floating point for cuBLAS to read.
_DEQUANTIZE_ROWS = 1024
SHARED_ROWS = 16
"""Up to here the fastest kernel does little more than read weights, and one may serve several."""

# Warps, tiles of 32 columns, whether to load ahead, thread blocks per multiprocessor; by the largest number of rows
# that they serve.
_GEMV_TILES = {
    16: ((4, 2, True, 2), (4, 2, True, 3), (4, 2, True, 4), (8, 1, True, 2), (8, 2, False, 2), (4, 1, True, 4)),
    32: ((4, 1, True, 2), (4, 1, False, 2), (8, 1, True, 2)),
}
# Most rows and input features of a tile, warps, stages, thread blocks per multiprocessor; likewise. Up to 16 rows they
# are for group sizes that the other kernel does not take.
_GEMM_TILES = {
    64: ((64, 128, 4, 5, 2), (64, 128, 4, 3, 3), (64, 128, 8, 3, 1)),
    128: ((128, 128, 4, 3, 2), (128, 128, 4, 4, 1), (128, 128, 8, 4, 1)),
    1024: ((256, 128, 8, 3, 1), (256, 64, 4, 3, 2), (128, 128, 4, 4, 1)),
}


def quantized_matmul_reference(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool
) -> Tensor:
    """The definition of `quantized_matmul`."""
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
    return _product(x, [qweight, qzeros, scales], bits, group_size, sym)


@operator("lkq_hf::quantized_matmul_shared")
def quantized_matmul_shared(x: Tensor, weights: list[Tensor], bits: int, group_size: int, sym: bool) -> Tensor:
    """Products of the same activations with several weights, side by side; not differentiable.

    They are one kernel: of several, each has to start and to run dry. For more than `SHARED_ROWS` rows it is not
    the fastest one.

    Args:
        x: `[..., in_features]`, floating point.
        weights: qweight, qzeros and scales, as `quantized_matmul` takes them, of one weight after the other.
        bits, group_size, sym: of all weights.

    Returns:
        `[..., out_features of all weights]` in the dtype of ``x``.
    """
    return _product(x, weights, bits, group_size, sym)


fixed_weights: dict[int, list[tuple[list[Tensor], int, int, bool]]] = {}
"""What `quantized_matmul_fixed` knows, by handle and number: the arguments of `quantized_matmul_shared`
after the first. Whoever adds them takes them out again."""


@operator("lkq_hf::quantized_matmul_fixed")
def quantized_matmul_fixed(x: Tensor, handle: int, number: int, out_features: int) -> Tensor:
    """`quantized_matmul_shared` with weights that are no inputs of the operator.

    A CUDA graph that holds it reads the memory that was theirs when it was recorded: new weights need a new handle.

    Args:
        x: `[..., in_features]`, floating point.
        handle, number: of `fixed_weights`.
        out_features: of all weights together.

    Returns:
        `[..., out_features]` in the dtype of ``x``.
    """
    return _product(x, *fixed_weights[handle][number])


def _product(x: Tensor, weights: Sequence[Tensor], bits: int, group_size: int, sym: bool) -> Tensor:
    """``weights``: qweight, qzeros and scales of one weight after the other."""
    in_features = x.shape[-1]
    rows = x.numel() // in_features
    if (
        rows == 0
        or rows > _DEQUANTIZE_ROWS
        or group_size % 32
        # Scales answer for their weights: every question costs the host time, at every product.
        or not use_triton(x, *weights[2::3], dtypes=KERNEL_DTYPES)
    ):
        return _dequantized_product(x, *weights, bits=bits, group_size=group_size, sym=sym)
    widths = tuple([qweight.shape[1] for qweight in weights[::3]])
    # The number of rows counts in powers of two, so that a growing batch is not tuned again and again.
    key = (x.dtype, x.device, bits, group_size, sym, in_features, widths, next_power_of_2(rows))
    candidates, plain = ways_to_multiply(*key)
    if not candidates:
        return torch.cat(
            [_product(x, weights[i : i + 3], bits, group_size, sym) for i in range(0, len(weights), 3)], -1
        )
    with torch.cuda.device_of(x):
        return run_fastest(key, candidates, plain, x.contiguous(), weights)


def _dequantized_product(x: Tensor, *tensors: Tensor, bits: int, group_size: int, sym: bool) -> Tensor:
    weights = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
    if fits_int4(x, bits, group_size):
        products = [int4_matmul(x, *weight, group_size=group_size, sym=sym) for weight in weights]
    else:
        products = [x @ dequantize(*weight, bits, group_size, sym, x.dtype) for weight in weights]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


Way = Callable[..., Tensor]
"""Takes contiguous activations `[..., in_features]`, and qweight, qzeros and scales of one weight after the other."""


@cache  # every product asks
def ways_to_multiply(
    dtype: torch.dtype,
    device: torch.device,
    bits: int,
    group_size: int,
    sym: bool,
    in_features: int,
    widths: tuple[int, ...],
    bucket: int,
) -> tuple[list[Way], Way]:
    """Every kernel and tile worth trying for up to ``bucket`` rows, none perhaps for several weights; and plain torch.

    Args:
        dtype, device: of the activations.
        widths: output features of each weight.
    """
    from lkq_hf.kernels.quantized_gemm_triton import quantized_gemm, tile_features
    from lkq_hf.kernels.quantized_gemv_triton import QuantizedGemv, chunk_features

    def splits(thread_blocks: int, output_tiles: int, most: int) -> int:
        return max(1, min(round(thread_blocks * multiprocessors(device) / output_tiles), most))

    weight_format: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym}
    ways: list[Way] = []
    plain = partial(_dequantized_product, **weight_format)
    columns = sum(widths)
    chunk = chunk_features(bits, group_size)
    if chunk is not None and bucket <= max(_GEMV_TILES):
        for num_warps, column_tiles, prefetch, blocks in _tiles(_GEMV_TILES, bucket):
            split_k = splits(blocks, ceil_div(columns, 32 * column_tiles), in_features // chunk // num_warps)
            ways.append(
                QuantizedGemv(
                    dtype,
                    device,
                    in_features,
                    widths,
                    **weight_format,
                    chunk=chunk,
                    num_warps=num_warps,
                    column_tiles=column_tiles,
                    prefetch=prefetch,
                    split_k=split_k,
                )
            )
    if (ways and bucket <= SHARED_ROWS) or len(widths) > 1:
        return ways, plain
    for most_rows, most_features, num_warps, num_stages, blocks in _tiles(_GEMM_TILES, bucket):
        block_m = min(max(bucket, 16), most_rows)
        block_k = tile_features(most_features, in_features, group_size)
        output_tiles = ceil_div(columns, 16 * num_warps) * ceil_div(bucket, block_m)
        ways.append(
            partial(
                quantized_gemm,
                **weight_format,
                block_m=block_m,
                block_k=block_k,
                split_k=splits(blocks, output_tiles, in_features // block_k // 2),
                num_warps=num_warps,
                num_stages=num_stages,
            )
        )
    return ways, plain


def _tiles(table: dict[int, tuple], rows: int) -> tuple:
    return table[min(most for most in table if rows <= most)]


@quantized_matmul.register_fake
def _(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, qzeros, scales, ctx.bits, ctx.group_size, ctx.sym = inputs
    ctx.save_for_backward(qweight, qzeros, scales)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    # The weight is dequantized again rather than kept: one layer's weight at a time is in memory.
    qweight, qzeros, scales = ctx.saved_tensors
    weight = dequantize(qweight, qzeros, scales, ctx.bits, ctx.group_size, ctx.sym, grad_output.dtype)
    return grad_output @ weight.t(), None, None, None, None, None, None


@torch.library.register_fake("lkq_hf::quantized_matmul_shared")
def _(x: Tensor, weights: list[Tensor], bits: int, group_size: int, sym: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(qweight.shape[1] for qweight in weights[::3])))


@torch.library.register_fake("lkq_hf::quantized_matmul_fixed")
def _(x: Tensor, handle: int, number: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


quantized_matmul.register_autograd(_backward, setup_context=_setup_context)
