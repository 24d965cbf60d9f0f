"""A few activation rows times a packed weight on the tensor cores, at nearly the speed of reading the weight.

Words go from memory into registers and, by two operations for two levels, into operands of the tensor cores: not
through shared memory, and with the same effort for 1 to 8 rows. Of a warp's 32 columns a thread loads four
neighboring ones, of every fourth packed row, and the tensor cores add up what the four threads of the same columns
have. Scales and zero points are applied to float32 sums, once a chunk of input features.

Memory takes long to answer, so the L2 cache fetches chunks ahead. Loads into registers cannot be ahead: the assembler
moves them behind the arithmetic.

Warps of a thread block share its chunks, and so may thread blocks, in a fixed order: the result does not depend on
timing. Triton has no lists: registers are kept in tuples that are made anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lkq_hf.kernels.dispatch import ceil_div, dependent_launch, interpreting
from lkq_hf.kernels.launch import RepeatedLaunch, aligned
from lkq_hf.kernels.level_pairs_triton import (
    activation_pair,
    level_factor,
    level_pair,
    pair_count,
    plain_pairs,
)
from lkq_hf.kernels.mma_triton import mma
from lkq_hf.kernels.packed_fields_triton import (
    fetch,
    field_number,
    four_halves,
    four_zeros,
    load_four,
    load_four_zeros,
    load_two,
    magic_exponent,
    row_features,
    row_words,
)
from lkq_hf.kernels.split_sum_triton import split_buffer, split_sum


# Specializing these sizes would compile again for another number of rows or another layer and gain nothing.
@triton.jit(do_not_specialize=["rows", "chunks", "chunks_per_split"])
def _gemv_kernel(
    x,
    weights,
    widths,
    partial,
    rows,
    all_columns,
    in_features,
    chunks,
    chunks_per_split,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    BFLOAT16: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    FETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    qweight, qzeros, scales = weights[0], weights[1], weights[2]
    columns = widths[0]
    block = tl.program_id(0)
    place = 0  # in the result, of the first column of this block's weight
    for i in tl.static_range(1, WEIGHTS):
        blocks = tl.cdiv(columns, 32 * COLUMN_TILES)
        if block >= blocks:
            block -= blocks
            place += columns
            qweight, qzeros, scales = weights[3 * i], weights[3 * i + 1], weights[3 * i + 2]
            columns = widths[i]
    scales = scales.to(tl.pointer_type(tl.int32), bitcast=True)
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    column = block * (32 * COLUMN_TILES) + lane // 4 * 4
    first = tl.program_id(1) * chunks_per_split
    end = tl.minimum(first + chunks_per_split, chunks)
    chunk = first + thread // 32
    sources = (x, qweight, qzeros, scales)
    sizes = (rows, columns, in_features)
    if DEPENDENT:
        # Unlike the activations, the weight is there before the kernel ahead of this one is done.
        for i in tl.static_range(AHEAD):
            _fetch_chunk(
                sources, sizes, chunk + i * WARPS, end, column, lane, BITS, SYM, CHUNK, GROUP_SIZE, COLUMN_TILES
            )
        gdc_wait()
    total = (tl.zeros((32 * WARPS,), tl.float32),) * (8 * ROW_TILES * COLUMN_TILES)
    for _ in range(first, end, WARPS):
        if FETCH:
            _fetch_chunk(
                sources, sizes, chunk + AHEAD * WARPS, end, column, lane, BITS, SYM, CHUNK, GROUP_SIZE, COLUMN_TILES
            )
        loaded = _load_chunk(
            sources, sizes, chunk, end, column, lane, BITS, SYM, CHUNK, GROUP_SIZE, ROW_TILES, COLUMN_TILES
        )
        total = _add_chunk(
            total,
            loaded,
            column,
            lane,
            BITS,
            SYM,
            BFLOAT16,
            CHUNK,
            groups_of(CHUNK, GROUP_SIZE),
            ROW_TILES,
            COLUMN_TILES,
            INTERPRETED,
        )
        chunk += WARPS
    if DEPENDENT:
        gdc_launch_dependents()
    lane = tl.arange(0, 32)
    for row_tile in tl.static_range(ROW_TILES):
        for tile in tl.static_range(COLUMN_TILES):
            sums = _over_warps(_part(total, tile * ROW_TILES + row_tile, 8), WARPS)
            for second in tl.static_range(2):
                # Of the columns 0 to 3, the sums have row `second` at 0 + second, 2 + second, 4 + second, 6 + second.
                even = tl.join(sums[second], sums[4 + second])
                odd = tl.join(sums[2 + second], sums[6 + second])
                four = tl.reshape(tl.join(even, odd), (32, 4))
                row = (8 * row_tile + lane % 4 * 2 + second)[:, None]
                at = (block * (32 * COLUMN_TILES) + 32 * tile + lane // 4 * 4)[:, None] + tl.arange(0, 4)
                tl.store(
                    partial + (tl.program_id(1) * rows + row) * all_columns + place + at,
                    four.to(partial.dtype.element_ty),
                    mask=(row < rows) & (at < columns),
                )


@triton.constexpr_function
def groups_of(chunk, group_size):
    """Groups of a chunk, or 1 if it is a part of one."""
    return max(1, chunk // group_size)


@triton.jit
def _group(chunk, PART: tl.constexpr, in_features, CHUNK: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The group of one part of a chunk; of a part past the end of the weight, the last one."""
    if CHUNK > GROUP_SIZE:
        return tl.minimum(chunk * (CHUNK // GROUP_SIZE) + PART, in_features // GROUP_SIZE - 1)
    else:
        return chunk // (GROUP_SIZE // CHUNK)


@triton.jit
def _load_chunk(
    sources,
    sizes,
    chunk,
    end,
    column,
    lane,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):
    """What a thread needs of its chunk: words; activations; scales and zero points. The order is that of the loops.

    Masks would take more registers and instructions than they save loads. So a thread past the last column or feature
    loads others, and one past the last chunk loads its last one again; their activations or their scales are 0.
    """
    x, qweight, qzeros, scales = sources
    rows, columns, in_features = sizes
    FEATURES: tl.constexpr = row_features(BITS)
    there = chunk < end
    chunk = tl.minimum(chunk, end - 1)
    words = ()
    activations = ()
    for step in tl.static_range(CHUNK // FEATURES // 4):
        packed_row = chunk * (CHUNK // FEATURES) + 4 * step + lane % 4
        if CHUNK > GROUP_SIZE:
            packed_row = tl.minimum(packed_row, in_features // FEATURES - 1)
        for tile in tl.static_range(COLUMN_TILES):
            at = tl.minimum(column + 32 * tile, columns - 4)
            for word in tl.static_range(row_words(BITS)):
                words = words + load_four(qweight + (packed_row * row_words(BITS) + word) * columns + at)
    for step in tl.static_range(CHUNK // FEATURES // 4):
        packed_row = chunk * (CHUNK // FEATURES) + 4 * step + lane % 4
        for row_tile in tl.static_range(ROW_TILES):
            row = 8 * row_tile + lane // 4
            inside = row < rows
            if CHUNK > GROUP_SIZE:
                inside &= packed_row * FEATURES < in_features
            pointers = x + (row * in_features + packed_row * FEATURES) // 2
            if FEATURES == 4:
                activations = activations + load_two(pointers, inside)
            else:
                for eight in tl.static_range(FEATURES // 8):
                    activations = activations + load_four(pointers + 4 * eight, inside)
    grid = ()
    for part in tl.static_range(groups_of(CHUNK, GROUP_SIZE)):
        group = _group(chunk, part, in_features, CHUNK, GROUP_SIZE)
        for tile in tl.static_range(COLUMN_TILES):
            at = tl.minimum(column + 32 * tile, columns - 4)
            grid = grid + load_two(scales + (group * columns + at) // 2, there)
            if not SYM:
                grid = grid + load_four_zeros(qzeros, group, at, there, columns, BITS)
    return words, activations, grid


@triton.jit
def _fetch_chunk(
    sources,
    sizes,
    chunk,
    end,
    column,
    lane,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):
    """Have the L2 cache fetch the words, scales and zero points of a chunk, if it is before the end."""
    _, qweight, qzeros, scales = sources
    _, columns, in_features = sizes
    LINES: tl.constexpr = CHUNK // row_features(BITS) * row_words(BITS)
    wanted = chunk < end
    for tile in tl.static_range(COLUMN_TILES):
        at = tl.minimum(column + 32 * tile, columns - 4)
        for four in tl.static_range(LINES // 4):
            line = chunk * LINES + 4 * four + lane % 4
            inside = wanted
            if CHUNK > GROUP_SIZE:
                inside &= line < in_features // row_features(BITS) * row_words(BITS)
            fetch(qweight + line * columns + at, inside)
        for part in tl.static_range(groups_of(CHUNK, GROUP_SIZE)):
            group = _group(chunk, part, in_features, CHUNK, GROUP_SIZE)
            fetch(scales + (group * columns + at) // 2, wanted)
            if not SYM:
                fetch(qzeros + (group * columns + at) * BITS // 32, wanted)


@triton.jit
def _add_chunk(
    total,
    loaded,
    column,
    lane,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    BFLOAT16: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``total`` plus a chunk's products. For each column tile and row tile, it has the sums of two weight operands."""
    words, activations, grid = loaded
    PAIRS: tl.constexpr = pair_count(BITS)
    TILES: tl.constexpr = ROW_TILES * CHUNK_GROUPS  # of activations: a product adds up features of one group
    zero = tl.zeros(column.shape, tl.float32)
    sums = (zero,) * (8 * COLUMN_TILES * TILES)
    plain_sums = (zero,) * (4 * TILES)
    for step in tl.static_range(CHUNK // row_features(BITS) // 4):
        for pair in tl.static_range(0, PAIRS, 2):
            right = ()
            for row_tile in tl.static_range(ROW_TILES):
                x = _part(activations, step * ROW_TILES + row_tile, row_features(BITS) // 2)
                first = activation_pair(x, pair, BITS, BFLOAT16, INTERPRETED)
                second = activation_pair(x, pair + 1, BITS, BFLOAT16, INTERPRETED)
                for part in tl.static_range(CHUNK_GROUPS):
                    if CHUNK_GROUPS == 1:
                        right = right + (first, second)  # type: ignore[assignment]
                    else:
                        mine = lane % 4 // (4 // CHUNK_GROUPS) == part
                        right = right + (tl.where(mine, first, 0), tl.where(mine, second, 0))  # type: ignore[assignment]
            left = plain_pairs(lane, pair, pair + 1, BITS, BFLOAT16)
            plain_sums = _add_products(plain_sums, left, right, TILES, BFLOAT16, INTERPRETED)
            new_sums = ()
            for operand in tl.static_range(2 * COLUMN_TILES):
                four_columns = _part(words, step * COLUMN_TILES + operand // 2, 4 * row_words(BITS))
                left = _weight_operand(four_columns, operand % 2, pair, BITS, BFLOAT16, INTERPRETED)
                products = _part(sums, operand, 4 * TILES)
                new_sums = new_sums + _add_products(products, left, right, TILES, BFLOAT16, INTERPRETED)
            sums = new_sums
    for part in tl.static_range(CHUNK_GROUPS):
        new_total = ()
        for tile in tl.static_range(COLUMN_TILES):
            for row_tile in tl.static_range(ROW_TILES):
                for operand in tl.static_range(2):
                    new_total = new_total + _scaled(
                        _part(total, 2 * (tile * ROW_TILES + row_tile) + operand, 4),
                        _part(sums, ((2 * tile + operand) * ROW_TILES + row_tile) * CHUNK_GROUPS + part, 4),
                        _part(plain_sums, row_tile * CHUNK_GROUPS + part, 4),
                        _part(grid, part * COLUMN_TILES + tile, 2 if SYM else 4 if BITS == 3 else 3),
                        column + 32 * tile,
                        operand,
                        BITS,
                        SYM,
                        BFLOAT16,
                    )
        total = new_total
    return total


@triton.jit
def _part(values, INDEX: tl.constexpr, SIZE: tl.constexpr):
    """Part ``INDEX`` of a tuple cut into parts of ``SIZE``."""
    return values[INDEX * SIZE : (INDEX + 1) * SIZE]


@triton.jit
def _add_products(sums, left, right, TILES: tl.constexpr, BFLOAT16: tl.constexpr, INTERPRETED: tl.constexpr):
    """One left operand times every tile of activations."""
    new_sums = ()
    for tile in tl.static_range(TILES):
        new_sums = new_sums + mma(_part(sums, tile, 4), left, _part(right, tile, 2), BFLOAT16, INTERPRETED)
    return new_sums


@triton.jit
def _weight_operand(
    words,
    OPERAND: tl.constexpr,
    PAIR: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT16: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Two pairs of columns 2 * OPERAND and 2 * OPERAND + 1 of the four in ``words``."""
    left = ()
    for pair in tl.static_range(2):
        for column in tl.static_range(2):
            # At 3 bits a column's words are four apart.
            word0 = words[2 * OPERAND + column]
            word1 = words[(4 if BITS == 3 else 0) + 2 * OPERAND + column]
            word2 = words[(8 if BITS == 3 else 0) + 2 * OPERAND + column]
            left = left + (level_pair(word0, word1, word2, PAIR + pair, BITS, BFLOAT16, INTERPRETED),)  # type: ignore[assignment]
    return left


@triton.jit
def _scaled(
    total,
    sums,
    plain_sums,
    scales,
    column,
    OPERAND: tl.constexpr,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """``total`` plus scale times (sum of q x - zero point * sum of x)."""
    MAGIC: tl.constexpr = 2.0 ** magic_exponent(BFLOAT16)
    FACTOR: tl.constexpr = level_factor(BITS)
    if not SYM:
        word = four_zeros(scales[2:], column, BITS)
    new_total = ()
    for half in tl.static_range(2):
        scale = four_halves(scales, 2 * OPERAND + half)
        if SYM:
            zero = 2.0 ** (BITS - 1)
        else:
            zero = field_number(word, 2 * OPERAND + half, BITS)
        for row in tl.static_range(2):
            products = sums[2 * half + row] - MAGIC * plain_sums[row]
            new_total = new_total + (total[2 * half + row] + scale * (FACTOR * products - zero * plain_sums[2 + row]),)  # type: ignore[assignment]
    return new_total


@triton.jit
def _over_warps(sums, WARPS: tl.constexpr):
    """Eight tensors with an element per thread, added up over the warps."""
    parts = ()
    for i in tl.static_range(8):
        parts = parts + (tl.reshape(sums[i], (WARPS, 32)),)  # type: ignore[assignment]
    return tl.reduce(parts, 0, _add_eight)


@triton.jit
def _add_eight(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


def chunk_features(bits: int, group_size: int) -> int | None:
    """Input features to which scales are applied together, or None if groups of this size do not fit the kernel."""
    step = 4 * row_features(bits)
    if group_size % step == 0:
        return max(size for size in (128, 64, 32, step) if size >= step and group_size % size == 0)
    return step if step % group_size == 0 else None


class QuantizedGemv:
    """Activations `[..., in_features]`, contiguous, times packed weights: `[..., out_features of all of them]`.

    Args:
        dtype, device: of the activations.
        in_features, bits, group_size, sym: of all weights.
        widths: output features of each weight.
        chunk: what `chunk_features` says.
        num_warps: warps of a thread block.
        column_tiles: 32 columns each, of a thread block.
        registers: of a thread, at most. With few, more thread blocks run at a time; with many, the assembler loads all
            of a chunk before it multiplies.
        ahead: of a warp's chunks, how many the L2 cache fetches before they are loaded: memory takes longer to answer
            than registers have room for what is under way. Only where kernels start before the one ahead ends.
        split_k: thread blocks that share the chunks of a column.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        in_features: int,
        widths: tuple[int, ...],
        *,
        bits: int,
        group_size: int,
        sym: bool,
        chunk: int,
        num_warps: int,
        column_tiles: int,
        registers: int,
        ahead: int,
        split_k: int,
    ) -> None:
        self._widths = widths
        self._columns = sum(widths)
        chunks = ceil_div(in_features, chunk)
        chunks_per_split = ceil_div(chunks, split_k)
        self._split_k = split_k = ceil_div(chunks, chunks_per_split)  # none without a chunk
        self._grid = (sum(ceil_div(width, 32 * column_tiles) for width in widths), split_k, 1)
        self._sizes = (self._columns, in_features, chunks, chunks_per_split)
        iterations = ceil_div(chunks_per_split, num_warps)
        options = dependent_launch(device)
        self._constants = {
            "BITS": bits,
            "SYM": sym,
            "BFLOAT16": dtype == torch.bfloat16,
            "CHUNK": chunk,
            "GROUP_SIZE": group_size,
            "COLUMN_TILES": column_tiles,
            "WEIGHTS": len(widths),
            "WARPS": num_warps,
            "AHEAD": min(ahead, iterations),
            # One chunk ahead would be fetched as late as it is loaded.
            "FETCH": bool(options) and 1 < ahead < iterations,
            "DEPENDENT": bool(options),
            "INTERPRETED": interpreting(),
        }
        self._options = {"num_warps": num_warps, "maxnreg": registers, **options}
        self._launches: dict[int, RepeatedLaunch] = {}

    def __call__(self, x: Tensor, *weights: Tensor) -> Tensor:
        """``weights``: qweight, qzeros and scales of one after the other."""
        rows = x.numel() // x.shape[-1]
        row_tiles = ceil_div(rows, 8)
        launch = self._launches.get(row_tiles)
        if launch is None:
            constants = {**self._constants, "ROW_TILES": row_tiles}
            launch = self._launches[row_tiles] = RepeatedLaunch(_gemv_kernel, constants, **self._options)
        partial = split_buffer(x, self._columns, self._split_k)
        tensors, addresses = aligned((x, *weights))
        if launch.takes_addresses:
            launch(self._grid, addresses[0], addresses[1:], self._widths, partial.data_ptr(), rows, *self._sizes)
        else:
            launch(self._grid, tensors[0], tensors[1:], self._widths, partial, rows, *self._sizes)
        return split_sum(x, partial, self._split_k)
