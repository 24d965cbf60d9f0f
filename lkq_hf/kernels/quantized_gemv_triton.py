"""A few activation rows times a packed weight, at the speed of reading the weight.

Every thread owns a few neighbouring output columns and some chunks of input features: it loads 16 bytes of
neighbouring columns at a time, multiplies on the float32 units, and applies scale and zero point once a chunk, to
sums. A thread block covers all chunks of its columns, or a fixed share of them, so that the result does not depend on
timing. Triton has no lists: what there is for each activation row is kept in tuples that are made anew.
"""

import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div
from lkq_hf.kernels.packed_fields_triton import (
    load_words,
    load_zeros,
    row_features,
    row_words,
    subnormal_field,
    subnormal_scale,
)
from lkq_hf.kernels.split_sum_triton import split_buffer, split_sum


# Specialising these sizes would compile again for another layer and gain nothing.
@triton.jit(do_not_specialize=["chunks", "chunks_per_group", "chunks_per_split"])
def _gemv_kernel(
    x,
    qweight,
    qzeros,
    scales,
    partial,
    columns,
    chunks,
    chunks_per_group,
    chunks_per_split,
    x_stride,
    M: tl.constexpr,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    FEATURES: tl.constexpr = row_features(BITS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * chunks_per_split
    end = tl.minimum(first + chunks_per_split, chunks)
    row_stride = row_words(BITS) * columns
    total = (tl.zeros((BLOCK_CHUNKS, BLOCK_N), tl.float32),) * M
    for start in range(first, end, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < end)[:, None] & (column < columns)[None, :]
        words = qweight + chunk[:, None] * (CHUNK // FEATURES * row_stride) + column[None, :]
        # Beyond the end the last chunk's activations are read, without a mask: their scale is 0.
        features = x + tl.minimum(chunk, end - 1)[:, None] * CHUNK
        level_sum = (tl.zeros((BLOCK_CHUNKS, BLOCK_N), tl.float32),) * M
        for row in tl.static_range(CHUNK // FEATURES):
            word0, word1, word2 = load_words(words + row * row_stride, mask, columns, BITS)
            for field in tl.static_range(FEATURES):
                level = subnormal_field(word0, word1, word2, field, BITS)
                new_level_sum = ()
                for m in tl.static_range(M):
                    value = tl.load(features + m * x_stride + (row * FEATURES + field)).to(tl.float32)
                    scaled = tl.broadcast_to(value * subnormal_scale(field, BITS), level.shape)
                    new_level_sum = new_level_sum + (tl.fma(level, scaled, level_sum[m]),)  # type: ignore[assignment]  # noqa: RUF005
                level_sum = new_level_sum
        group = (chunk // chunks_per_group)[:, None]
        scale = tl.load(scales + group * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if SYM:
            zero = 2.0 ** (BITS - 1)
        else:
            zero = load_zeros(qzeros, group, column[None, :], mask, columns, BITS)
        new_total = ()
        for m in tl.static_range(M):
            x_chunk = tl.load(features + m * x_stride + tl.arange(0, CHUNK)[None, :]).to(tl.float32)
            x_sum = tl.sum(x_chunk, axis=1)[:, None]
            result = total[m] + scale * (level_sum[m] * 2.0**64 - zero * x_sum)
            new_total = new_total + (result,)  # type: ignore[assignment]  # noqa: RUF005
        total = new_total
    for m in tl.static_range(M):
        result = tl.sum(total[m], axis=0).to(partial.dtype.element_ty)
        tl.store(partial + (tl.program_id(1) * M + m) * columns + column, result, mask=column < columns)


def quantized_gemv(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    chunk_features: int,
    block_chunks: int,
    block_n: int,
    split_k: int,
    num_warps: int,
) -> Tensor:
    """``x`` `[rows, in_features]`, contiguous, times the packed weight: `[rows, out_features]`.

    Args:
        chunk_features: input features per chunk, a multiple of 32 that divides ``group_size``.
        block_chunks: chunks that a thread block has in flight.
        block_n: output columns of a thread block.
        split_k: thread blocks that share the chunks of a column.
        num_warps: warps of a thread block.
    """
    rows, in_features = x.shape
    columns = qweight.shape[1]
    chunks = in_features // chunk_features
    partial = split_buffer(x, columns, split_k)
    _gemv_kernel[(ceil_div(columns, block_n), split_k)](
        x,
        qweight,
        qzeros,
        scales,
        partial,
        columns,
        chunks,
        group_size // chunk_features,
        ceil_div(chunks, split_k),
        x.stride(0),
        M=rows,
        BITS=bits,
        SYM=sym,
        CHUNK=chunk_features,
        BLOCK_CHUNKS=block_chunks,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    return split_sum(partial, x.dtype)
