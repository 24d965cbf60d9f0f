"""Up to a few hundred activation rows times a packed weight, on the tensor cores.

The fields of a packed row lie in one word, so a tile of words gives one operand tile per field. The sum over input
features does not care for their order: instead of spreading a tile's fields over its rows, every field is multiplied
with the activations that belong to it (every 8th feature at 4 bits, and so on).
"""

import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.packed_fields_triton import field_value, load_zeros, row_features, row_words
from lkq_hf.kernels.split_sum_triton import split_buffer, split_sum


# Specialising these would compile again for another number of rows and gain nothing. (That packed_rows and
# rows_per_split are multiples of 16 must be known: only then are the activations loaded 16 bytes at a time.)
@triton.jit(do_not_specialize=["m_rows", "rows_per_group"])
def _gemm_kernel(
    x,
    qweight,
    qzeros,
    scales,
    partial,
    m_rows,
    columns,
    packed_rows,
    rows_per_group,
    rows_per_split,
    x_stride_m,
    x_stride_row,
    x_stride_field,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    FEATURES: tl.constexpr = row_features(BITS)
    WORDS: tl.constexpr = row_words(BITS)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    first = tl.program_id(2) * rows_per_split
    end = tl.minimum(first + rows_per_split, packed_rows)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        x_mask = (m < m_rows)[:, None] & (row < end)[None, :]
        mask = (row < end)[:, None] & (column < columns)
        x_tile = x + m[:, None] * x_stride_m + row[None, :] * x_stride_row
        words = qweight + row[:, None] * (WORDS * columns) + column
        word0 = tl.load(words, mask=mask, other=0)
        word1 = word0
        word2 = word0
        if WORDS == 3:
            word1 = tl.load(words + columns, mask=mask, other=0)
            word2 = tl.load(words + 2 * columns, mask=mask, other=0)
        group = (row // rows_per_group)[:, None]
        scale = tl.load(scales + group * columns + column, mask=mask, other=0.0).to(tl.float32)
        if SYM:
            zero = 2.0 ** (BITS - 1)
        else:
            zero = load_zeros(qzeros, group, column, mask, columns, BITS)
        for field in tl.static_range(FEATURES):
            level = field_value(word0, word1, word2, field, BITS).to(tl.float32) - zero
            weight = (level * scale).to(x.dtype.element_ty)
            activation = tl.load(x_tile + field * x_stride_field, mask=x_mask, other=0.0)
            total = tl.dot(activation, weight, total)
    target = partial + (tl.program_id(2) * m_rows + m[:, None]) * columns + column
    tl.store(target, total.to(partial.dtype.element_ty), mask=(m < m_rows)[:, None] & (column < columns))


def quantized_gemm(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    regroup: bool,
    block_m: int,
    block_n: int,
    block_rows: int,
    split_k: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """``x`` `[rows, in_features]`, contiguous, times the packed weight: `[rows, out_features]`.

    Args:
        regroup: bring the activations of each field together first. It costs a launch, and lets their loads be wide.
        block_m: activation rows of a thread block.
        block_n: output columns of a thread block.
        block_rows: packed rows of a tile, at least 16.
        split_k: thread blocks that share the input features of an output tile.
        num_warps: warps of a thread block.
        num_stages: tiles in flight.
    """
    m_rows, in_features = x.shape
    columns = qweight.shape[1]
    features = row_features(bits)
    packed_rows = in_features // features
    if regroup:
        x = x.view(m_rows, packed_rows, features).transpose(1, 2).contiguous()
        x_stride_row, x_stride_field = 1, packed_rows
    else:
        x_stride_row, x_stride_field = features, 1
    partial = split_buffer(x.view(m_rows, in_features), columns, split_k)
    _gemm_kernel[(triton.cdiv(m_rows, block_m), triton.cdiv(columns, block_n), split_k)](
        x,
        qweight,
        qzeros,
        scales,
        partial,
        m_rows,
        columns,
        packed_rows,
        group_size // features,
        triton.cdiv(packed_rows, split_k * block_rows) * block_rows,
        in_features,
        x_stride_row,
        x_stride_field,
        BITS=bits,
        SYM=sym,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_ROWS=block_rows,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return split_sum(partial, x.dtype)
