"""Up to a few hundred activation rows times a packed weight, on the tensor cores.

The weight is the left operand, which the tensor cores read from registers; on the way from packed words to the order
in which they read them, Triton takes it through shared memory. A tile holds input features of one group, so that
integers less zero points, which half precision holds exactly, are multiplied first, and sums are scaled in float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, interpreting
from lkq_hf.kernels.packed_fields_triton import load_words, load_zeros, row_features, row_words
from lkq_hf.kernels.row_levels_triton import row_levels
from lkq_hf.kernels.split_sum_triton import split_buffer, split_sum


# Specialising these would compile again for another number of rows or another layer and gain nothing.
@triton.jit(do_not_specialize=["m_rows", "tiles", "tiles_per_group", "tiles_per_split"])
def _gemm_kernel(
    x,
    qweight,
    qzeros,
    scales,
    partial,
    m_rows,
    columns,
    in_features,
    tiles,
    tiles_per_group,
    tiles_per_split,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_K // row_features(BITS)
    DTYPE: tl.constexpr = x.dtype.element_ty
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < columns
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    row = tl.arange(0, ROWS)[None, :]
    feature = tl.arange(0, BLOCK_K)[:, None]
    first = tl.program_id(2) * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tiles)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in tl.range(first, end, num_stages=STAGES):
        words = qweight + (tile * ROWS + row) * (row_words(BITS) * columns) + column[:, None]
        word0, word1, word2 = load_words(words, inside[:, None], columns, BITS)
        group = tile // tiles_per_group
        scale = tl.load(scales + group * columns + column, mask=inside, other=0.0).to(tl.float32)[:, None]
        if SYM:
            zero = tl.full((BLOCK_N,), 2.0 ** (BITS - 1), tl.float32)
        else:
            zero = load_zeros(qzeros, group, column, inside, columns, BITS)
        levels = row_levels(word0, word1, word2, zero, BITS, DTYPE, INTERPRETED)
        weight = tl.reshape(levels, (BLOCK_N, BLOCK_K))
        # The second condition gives the mask the tile's shape, without which it would not be loaded asynchronously.
        mask = (m < m_rows) & (feature >= 0)
        activation = tl.load(x + m * in_features + tile * BLOCK_K + feature, mask=mask, other=0.0)
        if SCALE_WEIGHT:
            total = tl.dot((weight.to(tl.float32) * scale).to(DTYPE), activation, total)
        else:
            total += tl.dot(weight, activation) * scale
    target = partial + (tl.program_id(2) * m_rows + m) * columns + column[:, None]
    tl.store(target, total.to(partial.dtype.element_ty), mask=(m < m_rows) & inside[:, None])


def quantized_gemm(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    block_m: int,
    block_n: int,
    split_k: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """``x`` `[rows, in_features]`, contiguous, times the packed weight: `[rows, out_features]`.

    Args:
        block_m: activation rows of a thread block, at least 16. From 64 on the weight is scaled and rounded before the
            product: a second set of sums would not fit the registers.
        block_n: output columns of a thread block, 16 for each warp or a multiple of that.
        split_k: thread blocks that share the input features of an output tile.
        num_warps: warps of a thread block.
        num_stages: tiles in flight.
    """
    m_rows, in_features = x.shape
    columns = qweight.shape[1]
    block_k = next(size for size in (128, 64, 32) if group_size % size == 0)
    tiles = in_features // block_k
    partial = split_buffer(x, columns, split_k)
    _gemm_kernel[(ceil_div(columns, block_n), ceil_div(m_rows, block_m), split_k)](
        x,
        qweight,
        qzeros,
        scales,
        partial,
        m_rows,
        columns,
        in_features,
        tiles,
        group_size // block_k,
        ceil_div(tiles, split_k),
        BITS=bits,
        SYM=sym,
        SCALE_WEIGHT=block_m >= 64,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=num_stages,
        INTERPRETED=interpreting(),
        num_warps=num_warps,
    )
    return split_sum(partial, x.dtype)
