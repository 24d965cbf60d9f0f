"""Up to a few hundred activation rows times a packed weight, on the tensor cores.

The weight is the left operand, which the tensor cores read from registers. Its features keep their order: the four
threads that hold a column's share of an operand read the same words, and each turns its own pairs of fields to the
place in a float32 mantissa from which they are numbers at once. So fields need no sorting, and the compiler no
shared memory between packed words and tensor cores, which multiply one tile while the next is unpacked.

Scales and zero points are loaded one tile ahead.

The same kernel multiplies rows that are sorted by expert with each expert's weight: every thread block finds out from
where the experts' rows end which expert's rows it has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lkq_hf.kernels.dispatch import ceil_div, dependent_launch, interpreting
from lkq_hf.kernels.launch import RepeatedLaunch, aligned
from lkq_hf.kernels.packed_fields_triton import (
    and_or,
    bits_from,
    fetch,
    load_words,
    load_zero_words,
    row_features,
    row_words,
    zero_values,
)
from lkq_hf.kernels.split_sum_triton import split_buffer, split_sum


# Specializing these would compile again for another number of rows or another layer and gain nothing.
@triton.jit(do_not_specialize=["m_rows", "tiles", "groups", "tiles_per_group", "tiles_per_split"])
def _gemm_kernel(
    x,
    qweight,
    qzeros,
    scales,
    partial,
    row_ends,
    m_rows,
    columns,
    in_features,
    tiles,
    groups,
    tiles_per_group,
    tiles_per_split,
    EXPERTS: tl.constexpr,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_K // row_features(BITS)
    DTYPE: tl.constexpr = x.dtype.element_ty
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < columns
    first_row = tl.program_id(1) * BLOCK_M
    if EXPERTS > 0:
        expert, first_row, m_rows = _rows_of_block(row_ends, tl.program_id(1), EXPERTS, BLOCK_M)
        if expert >= EXPERTS:
            return  # more thread blocks are launched than the experts' rows may need
        # Offsets of 64 bits: all experts' weights are one tensor, and a token has a row for each of its experts.
        expert = expert.to(tl.int64)
        qweight += expert * (tiles * (ROWS * row_words(BITS)) * columns)
        qzeros += expert * (groups * (columns * BITS // 32))
        scales += expert * (groups * columns)
        x += first_row.to(tl.int64) * in_features
        partial += first_row.to(tl.int64) * columns
        m_rows -= first_row
        first_row = 0
    m = (first_row + tl.arange(0, BLOCK_M))[None, :]
    row = tl.arange(0, ROWS)[None, :]
    feature = tl.arange(0, BLOCK_K)[:, None]
    first = tl.program_id(2) * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tiles)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # The next tile's groups, counted: a division would be a large part of the integer arithmetic of a tile.
    group = first // tiles_per_group * TILE_GROUPS
    left_in_group = tiles_per_group - first % tiles_per_group
    next_grid = _load_grid(qzeros, scales, group, column, inside, columns, BITS, SYM, TILE_GROUPS)
    if DEPENDENT:
        # Unlike the activations, the weight is there before the kernel ahead of this one is done.
        LINES: tl.constexpr = ROWS * row_words(BITS)
        line = tl.arange(0, _power_of_2(LINES))[:, None]
        sector = (tl.program_id(0) * BLOCK_N + 8 * tl.arange(0, BLOCK_N // 8))[None, :]  # of 32 bytes
        for i in tl.static_range(AHEAD):
            wanted = (line < LINES) & (sector < columns) & (first + i < end)
            fetch(qweight + ((first + i) * LINES + line) * columns + sector, wanted)
        gdc_wait()
    for tile in tl.range(first, end, num_stages=STAGES):
        words = (
            qweight + tile * (ROWS * row_words(BITS) * columns) + (row * (row_words(BITS) * columns) + column[:, None])
        )
        word0, word1, word2 = load_words(words, inside[:, None], columns, BITS)
        scale, zero_word, zero_above = next_grid
        # Without a branch: Triton's compiler would move it, and the loads, to the end of the loop.
        ends = left_in_group == 1
        left_in_group = tl.where(ends, tiles_per_group, left_in_group - 1)
        group = tl.where(ends, tl.minimum(group + TILE_GROUPS, groups - TILE_GROUPS), group)
        next_grid = _load_grid(qzeros, scales, group, column, inside, columns, BITS, SYM, TILE_GROUPS)
        if SYM:
            zero = tl.full((BLOCK_N, TILE_GROUPS), 2.0 ** (BITS - 1), tl.float32)
        else:
            zero = zero_values(zero_word, zero_above, column[:, None], BITS)
        scale = _of_rows(scale.to(tl.float32), ROWS)
        even, odd = _field_pairs(word0, word1, word2, scale, _of_rows(zero, ROWS), BITS, INTERPRETED)
        weight = tl.reshape(tl.join(even.to(DTYPE), odd.to(DTYPE)), (BLOCK_N, BLOCK_K))
        activation = tl.load(x + tile * BLOCK_K + (tl.minimum(m, m_rows - 1) * in_features + feature))
        total = tl.dot(weight, activation, total)
    if DEPENDENT:
        gdc_launch_dependents()
    target = partial + (tl.program_id(2) * m_rows + m) * columns + column[:, None]
    tl.store(target, total.to(partial.dtype.element_ty), mask=(m < m_rows) & inside[:, None])


@triton.jit
def _rows_of_block(ends, block, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert, the first of the rows, and the end of the expert's rows, of the thread blocks along the rows."""
    expert = tl.arange(0, _power_of_2(EXPERTS))
    known = expert < EXPERTS
    end = tl.load(ends + expert, mask=known, other=0)
    start = tl.load(ends + expert - 1, mask=known & (expert > 0), other=0)
    blocks = tl.where(known, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    last = tl.cumsum(blocks, 0)
    found = tl.sum((last <= block).to(tl.int32), 0)
    mine = expert == found
    first_row = tl.sum(tl.where(mine, start + (block - last + blocks) * BLOCK_M, 0), 0)
    return found, first_row, tl.sum(tl.where(mine, end, 0), 0)


@triton.constexpr_function
def _power_of_2(n):
    return 1 << (n - 1).bit_length()


@triton.jit
def _load_grid(
    qzeros,
    scales,
    group,
    column,
    inside,
    columns,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    """Scales of a tile's groups, from ``group`` on, and the words with their zero points: `[columns, groups]`."""
    group = group + tl.arange(0, TILE_GROUPS)[None, :]
    column = column[:, None]
    # The second condition gives the mask the pointers' shape, of which Triton's compiler makes less code.
    inside = inside[:, None] & (group >= 0)
    scale = tl.load(scales + group * columns + column, mask=inside, other=0.0)
    if SYM:
        return scale, scale, scale  # not read
    else:
        word, above = load_zero_words(qzeros, group, column, inside, columns, BITS)
        return scale, word, above


@triton.jit
def _of_rows(values, ROWS: tl.constexpr):
    """`[columns, groups]` repeated for each packed row of a group: `[columns, rows]`."""
    COLUMNS: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], (COLUMNS, GROUPS, ROWS // GROUPS)), (COLUMNS, ROWS))


@triton.jit
def _field_pairs(word0, word1, word2, scale, zero, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Fields 2j and fields 2j + 1 of packed rows as ``scale * (q - zero)``, each float32 `[columns, rows, pairs]`.

    The words, ``scale`` and ``zero`` are `[columns, rows]`.
    """
    pair = tl.arange(0, row_features(BITS) // 2)[None, None, :]
    UPPER: tl.constexpr = 23 - BITS  # where the mantissa's highest field begins
    LOWER: tl.constexpr = UPPER if BITS == 8 else UPPER - BITS
    word0 = word0[:, :, None]
    if BITS == 3:
        word1 = word1[:, :, None]
        word2 = word2[:, :, None]
        # A thread has one pair of every eight fields, which are three bytes. Which eight is known when the kernel is
        # compiled: only the two in the middle have to be cut out of two words.
        eight = pair >> 2
        second = eight == 1
        word, above = tl.where(second, word0, word1), tl.where(second, word1, word2)
        cut = bits_from(word, above, tl.where(second, 24, 16), INTERPRETED)
        fields = tl.where(eight == 0, word0, tl.where(eight == 3, word2, cut))
        first_bit = 6 * (pair & 3) + tl.where(eight == 3, 8, 0)
        even = bits_from(fields, fields, (first_bit - LOWER) & 31, INTERPRETED)
        odd = even
    elif BITS == 8:
        even = bits_from(word0, word0, (16 * pair - LOWER) & 31, INTERPRETED)
        odd = bits_from(word0, word0, (16 * pair + 8 - UPPER) & 31, INTERPRETED)
    else:
        even = bits_from(word0, word0, (2 * BITS * pair - LOWER) & 31, INTERPRETED)
        odd = even
    scale = scale[:, :, None]
    zero = zero[:, :, None]
    even = _number(even, LOWER, BITS, INTERPRETED)
    odd = _number(odd, UPPER, BITS, INTERPRETED)
    # With such small exponents as good as a subtraction and a multiplication: off by less than 2**-15 of the scale.
    even = tl.fma(even, scale, -(2.0 ** (23 - LOWER) + zero) * scale)
    odd = tl.fma(odd, scale, -(2.0 ** (23 - UPPER) + zero) * scale)
    return even, odd


@triton.jit
def _number(word, BIT: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """``2**(23 - BIT) + q`` in float32 for the field q of ``BITS`` bits that begins at ``BIT`` of a word.

    The field stays where it is, as a part of the mantissa; the exponent is what makes it count as integers.
    """
    return and_or(word, (2**BITS - 1) << BIT, (127 + 23 - BIT) << 23, INTERPRETED).to(tl.float32, bitcast=True)


def tile_features(most: int, in_features: int, group_size: int) -> int:
    """Input features of a tile, at most ``most``: such that tiles have whole groups or groups whole tiles."""
    sizes = (size for size in (128, 64, 32) if size <= most and in_features % size == 0)
    return next(size for size in sizes if 0 in (size % group_size, group_size % size))


class QuantizedGemm:
    """Activations `[..., in_features]`, contiguous, times a packed weight: `[..., out_features]`.

    Weights are rounded to the dtype of the activations, as `dequantize` does.

    Args:
        device: of the activations.
        in_features, out_features, bits, group_size, sym: of the weight.
        block_m: activation rows of a thread block, at least 16.
        block_k: input features of a tile, what `tile_features` says.
        split_k: thread blocks that share the input features of an output tile.
        num_warps: warps of a thread block, 4 or a multiple of that; each has 16 output columns. With 32 of them, the
            assembler overwrote registers that the tensor cores had not read yet (seen with Triton 3.6's).
        num_stages: tiles in flight.
        ahead: tiles of the weight that the L2 cache fetches while the kernel ahead of this one ends.
    """

    def __init__(
        self,
        device: torch.device,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        sym: bool,
        block_m: int,
        block_k: int,
        split_k: int,
        num_warps: int,
        num_stages: int,
        ahead: int,
    ) -> None:
        self._columns = out_features
        self._block_m = block_m
        self._column_blocks = ceil_div(out_features, 16 * num_warps)
        tiles = in_features // block_k
        tiles_per_split = ceil_div(tiles, split_k)
        self._split_k = ceil_div(tiles, tiles_per_split)  # none without a tile
        groups = in_features // group_size
        self._sizes = (out_features, in_features, tiles, groups, max(1, group_size // block_k), tiles_per_split)
        options = dependent_launch(device)
        constants = {
            "EXPERTS": 0,
            "BITS": bits,
            "SYM": sym,
            "BLOCK_M": block_m,
            "BLOCK_N": 16 * num_warps,
            "BLOCK_K": block_k,
            "TILE_GROUPS": max(1, block_k // group_size),
            "STAGES": num_stages,
            "AHEAD": min(ahead, tiles_per_split),
            "DEPENDENT": bool(options),
            "INTERPRETED": interpreting(),
        }
        self._launch = RepeatedLaunch(_gemm_kernel, constants, num_warps=num_warps, **options)

    def __call__(self, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        partial = split_buffer(x, self._columns, self._split_k)
        tensors, addresses = aligned((x, qweight, qzeros, scales))
        grid = (self._column_blocks, ceil_div(rows, self._block_m), self._split_k)
        if self._launch.takes_addresses:
            self._launch(grid, *addresses, partial.data_ptr(), addresses[1], rows, *self._sizes)
        else:
            self._launch(grid, *tensors, partial, tensors[1], rows, *self._sizes)  # there are no ends of experts' rows
        return split_sum(x, partial, self._split_k)


def quantized_grouped_gemm(
    x: Tensor,
    ends: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    block_m: int,
    block_k: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """Rows of ``x`` `[rows, in_features]`, sorted by expert, times each expert's weight: `[rows, out_features]`.

    How many rows each expert has stays on the GPU: so many thread blocks are launched as any division of the rows may
    need, and those without rows end at once.

    Args:
        ends: int32 `[experts]`: where each expert's rows end. The result of rows from the last end on is undefined.
        qweight, qzeros, scales: of all experts, stacked.
        block_m, block_k, num_warps, num_stages: as of `QuantizedGemm`.
    """
    rows, in_features = x.shape
    experts, _, columns = qweight.shape
    block_n = 16 * num_warps
    tiles = in_features // block_k
    y = x.new_empty(rows, columns)
    row_blocks = min(rows, rows // block_m + min(experts, rows))
    _gemm_kernel[(ceil_div(columns, block_n), row_blocks, 1)](
        x,
        qweight,
        qzeros,
        scales,
        y,
        ends,
        rows,
        columns,
        in_features,
        tiles,
        scales.shape[1],
        max(1, group_size // block_k),
        tiles,
        EXPERTS=experts,
        BITS=bits,
        SYM=sym,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        TILE_GROUPS=max(1, block_k // group_size),
        STAGES=num_stages,
        AHEAD=0,
        # It reads what the kernel ahead of it may have written before it knows which weight it needs.
        DEPENDENT=False,
        INTERPRETED=interpreting(),
        num_warps=num_warps,
    )
    return y
