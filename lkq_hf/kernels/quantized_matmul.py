"""Activations times a group-wise quantized weight in the GPTQ layout."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkq_hf.kernels.autotune import fastest, run_fastest
from lkq_hf.kernels.dequantize import dequantize, dequantize_reference
from lkq_hf.kernels.dispatch import ceil_div, forced_implementation, multiprocessors, next_power_of_2, use_triton
from lkq_hf.kernels.int4_cpu import fits_int4, int4_matmul
from lkq_hf.kernels.launch import operator, sees_operators

KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16})

# From here on the arithmetic is long enough to hide writing the weight once in floating point for cuBLAS to read.
_DEQUANTIZE_ROWS = 1024
SHARED_ROWS = 16
"""Up to here the fastest kernel does little more than read weights, and one may serve several."""


Way = Callable[..., Tensor]
"""Takes contiguous activations `[..., in_features]`, and qweight, qzeros and scales of one weight after the other."""


class GemvTile(NamedTuple):
    """How `quantized_gemv_triton` divides a product."""

    num_warps: int
    """Warps of a thread block."""
    column_tiles: int
    """Of 32 columns each, of a thread block."""
    registers: int
    """Of a thread, at most."""
    ahead: int
    """Chunks of a warp that the L2 cache fetches before they are loaded."""
    blocks: float
    """Thread blocks per multiprocessor: as many as that share the input features of a column."""


class GemmTile(NamedTuple):
    """How `quantized_gemm_triton` divides a product."""

    most_rows: int
    most_features: int
    """Input features of a tile, less where the layer's or the group's size asks for it."""
    num_warps: int
    """Warps of a thread block, of 16 columns each."""
    num_stages: int
    """Tiles on their way."""
    ahead: int
    """Tiles of the weight that the L2 cache fetches before the kernel may read activations."""
    blocks: float
    """Thread blocks per multiprocessor, as above."""


# What is tried, by the largest number of rows that it is for: first what tends to need no second kernel, which adds up
# the parts of several thread blocks. Up to 16 rows the second table is for group sizes that the first kernel does not
# take.
_GEMV_TILES = {
    16: (
        GemvTile(16, 1, 128, 2, 1),
        GemvTile(8, 1, 64, 2, 1),
        GemvTile(4, 1, 128, 2, 4),
        GemvTile(4, 1, 64, 2, 4),
        GemvTile(4, 1, 128, 4, 5),
        GemvTile(4, 2, 168, 4, 2),
        GemvTile(8, 2, 128, 4, 2),
    ),
    32: (GemvTile(4, 1, 255, 2, 2), GemvTile(4, 1, 168, 2, 2), GemvTile(8, 1, 255, 2, 1)),
}
_GEMM_TILES = {
    32: (GemmTile(32, 128, 4, 4, 4, 3), GemmTile(32, 128, 8, 4, 4, 1)),
    64: (GemmTile(64, 128, 4, 5, 4, 2), GemmTile(64, 128, 4, 3, 4, 3), GemmTile(64, 128, 8, 3, 4, 1)),
    128: (GemmTile(128, 128, 4, 4, 4, 1), GemmTile(128, 128, 8, 4, 4, 1), GemmTile(128, 128, 4, 3, 4, 2)),
    1024: (
        GemmTile(256, 128, 8, 3, 4, 1),
        GemmTile(256, 128, 4, 3, 4, 1),
        GemmTile(256, 64, 4, 3, 4, 2),
        GemmTile(128, 128, 4, 4, 4, 1),
    ),
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
    return _multiply(x, [qweight, qzeros, scales], bits, group_size, sym)


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
    return _multiply(x, weights, bits, group_size, sym)


class RepeatedProduct:
    """`quantized_matmul_shared`, of weights of the same sizes every time: the kernel is looked up once.

    Where nothing would see the operator, its function is called instead.

    Args:
        bits, group_size, sym: of all weights.
    """

    def __init__(self, bits: int, group_size: int, sym: bool) -> None:
        self._format = bits, group_size, sym
        self._ways: dict[tuple[torch.dtype, torch.device, int], Way] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_ways": {}}  # compiled kernels are of this process

    def __call__(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """``x`` and ``weights`` as of `quantized_matmul_shared`."""
        if sees_operators(x):
            return quantized_matmul_shared(x, weights, *self._format)
        device = x.device
        key = x.dtype, device, x.numel() // x.shape[-1]
        way = self._ways.get(key)
        if (
            way is None
            or forced_implementation() == "torch"
            or (device.type == "cuda" and device.index != torch.cuda.current_device())
            or {(scales.dtype, scales.device) for scales in weights[2::3]} != {(torch.float16, device)}
        ):
            product = _kernel_product(x, weights, *self._format)
            y = _product(product, x, weights, *self._format)
            if product is not None and (way := fastest(product, *ways_to_multiply(product))) is not None:
                self._ways[key] = way
            return y
        return way(x.contiguous(), *weights)


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
    return _multiply(x, *fixed_weights[handle][number])


def _product(
    product: "Product | None", x: Tensor, weights: Sequence[Tensor], bits: int, group_size: int, sym: bool
) -> Tensor:
    """``product``: what `_kernel_product` says. ``weights``: qweight, qzeros and scales of one after the other."""
    if product is None:
        return _dequantized_product(x, *weights, bits=bits, group_size=group_size, sym=sym)
    candidates, plain = ways_to_multiply(product)
    if not candidates:
        one = [weights[i : i + 3] for i in range(0, len(weights), 3)]
        return torch.cat([_multiply(x, weight, bits, group_size, sym) for weight in one], -1)
    with torch.cuda.device_of(x):
        return run_fastest(product, candidates, plain, x.contiguous(), weights)


def _multiply(x: Tensor, weights: Sequence[Tensor], bits: int, group_size: int, sym: bool) -> Tensor:
    return _product(_kernel_product(x, weights, bits, group_size, sym), x, weights, bits, group_size, sym)


def _kernel_product(x: Tensor, weights: Sequence[Tensor], bits: int, group_size: int, sym: bool) -> "Product | None":
    """What there may be kernels for; None if plain torch has to do it."""
    in_features = x.shape[-1]
    rows = x.numel() // in_features
    if (
        rows == 0
        or rows > _DEQUANTIZE_ROWS
        or group_size % 32
        # Scales answer for their weights: every question costs the host time, at every product.
        or not use_triton(x, *weights[2::3], dtypes=KERNEL_DTYPES)
    ):
        return None
    widths = tuple([qweight.shape[1] for qweight in weights[::3]])
    return Product(x.dtype, x.device, bits, group_size, sym, in_features, widths, next_power_of_2(rows))


def _dequantized_product(x: Tensor, *tensors: Tensor, bits: int, group_size: int, sym: bool) -> Tensor:
    weights = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
    if fits_int4(x, bits, group_size):
        products = [int4_matmul(x, *weight, group_size=group_size, sym=sym) for weight in weights]
    else:
        products = [x @ dequantize(*weight, bits, group_size, sym, x.dtype) for weight in weights]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


class Product(NamedTuple):
    """Everything on which the choice of a kernel depends."""

    dtype: torch.dtype
    """Of the activations."""
    device: torch.device
    bits: int
    group_size: int
    sym: bool
    in_features: int
    widths: tuple[int, ...]
    """Output features of each weight."""
    rows: int
    """A power of two: a growing batch is not tuned again and again."""

    @property
    def columns(self) -> int:
        return sum(self.widths)

    @property
    def weight_format(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "sym": self.sym}

    def splits(self, blocks: float, output_tiles: int, most: int) -> int:
        """Thread blocks that share the input features of an output tile."""
        return max(1, min(round(blocks * multiprocessors(self.device) / output_tiles), most))


@cache  # every product asks
def ways_to_multiply(product: Product) -> tuple[list[Way], Way]:
    """Every kernel and tile worth trying, none perhaps for several weights; and plain torch."""
    ways: list[Way] = []
    plain = partial(_dequantized_product, **product.weight_format)
    if product.rows <= max(_GEMV_TILES):
        ways = [way for tile in _tiles(_GEMV_TILES, product.rows) if (way := gemv(product, tile)) is not None]
    if (ways and product.rows <= SHARED_ROWS) or len(product.widths) > 1:
        return ways, plain
    return [*ways, *(gemm(product, tile) for tile in _tiles(_GEMM_TILES, product.rows))], plain


def gemv(product: Product, tile: GemvTile) -> Way | None:
    """The product on the kernel for few rows, or None if it does not take such groups."""
    from lkq_hf.kernels.quantized_gemv_triton import QuantizedGemv, chunk_features

    chunk = chunk_features(product.bits, product.group_size)
    if chunk is None:
        return None
    output_tiles = sum(ceil_div(width, 32 * tile.column_tiles) for width in product.widths)
    return QuantizedGemv(
        product.dtype,
        product.device,
        product.in_features,
        product.widths,
        **product.weight_format,
        chunk=chunk,
        num_warps=tile.num_warps,
        column_tiles=tile.column_tiles,
        registers=tile.registers,
        ahead=tile.ahead,
        split_k=product.splits(tile.blocks, output_tiles, product.in_features // chunk // tile.num_warps),
    )


def gemm(product: Product, tile: GemmTile) -> Way:
    """The product, of one weight, on the kernel for many rows."""
    from lkq_hf.kernels.quantized_gemm_triton import QuantizedGemm, tile_features

    block_m = min(max(product.rows, 16), tile.most_rows)
    block_k = tile_features(tile.most_features, product.in_features, product.group_size)
    output_tiles = ceil_div(product.columns, 16 * tile.num_warps) * ceil_div(product.rows, block_m)
    return QuantizedGemm(
        product.device,
        product.in_features,
        product.columns,
        **product.weight_format,
        block_m=block_m,
        block_k=block_k,
        split_k=product.splits(tile.blocks, output_tiles, product.in_features // block_k // 2),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        ahead=tile.ahead,
    )


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
