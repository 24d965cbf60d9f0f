"""The Triton kernel of `lkq_hf.kernels.dequantize.dequantize`.

A thread unpacks four neighboring columns of a few packed rows of one group, straight from registers to memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div
from lkq_hf.kernels.packed_fields_triton import (
    field_number,
    field_value,
    four_halves,
    four_zeros,
    load_four,
    load_four_zeros,
    load_two,
    row_features,
    row_words,
)

_THREADS = 128


@triton.jit
def _dequantize_kernel(
    qweight,
    qzeros,
    scales,
    weight,
    columns,
    rows_per_group,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    FEATURES: tl.constexpr = row_features(BITS)
    WORDS: tl.constexpr = row_words(BITS)
    first_row = tl.program_id(0) * ROWS
    column = 4 * (tl.program_id(1) * THREADS + tl.arange(0, THREADS))
    inside = column < columns
    group = first_row // rows_per_group
    scale = load_two(scales.to(tl.pointer_type(tl.int32), bitcast=True) + (group * columns + column) // 2, inside)
    zeros = inside  # not read
    if not SYM:
        zeros = four_zeros(load_four_zeros(qzeros, group, column, inside, columns, BITS), column, BITS)
    words = ()
    for word in tl.static_range(ROWS * WORDS):
        words = words + load_four(qweight + (first_row * WORDS + word) * columns + column, inside)
    target = weight + first_row.to(tl.int64) * FEATURES * columns + column[:, None] + tl.arange(0, 4)
    for row in tl.static_range(ROWS):
        for field in tl.static_range(FEATURES):
            even = tl.join(
                _value(words, zeros, scale, row, field, 0, BITS, SYM),
                _value(words, zeros, scale, row, field, 2, BITS, SYM),
            )
            odd = tl.join(
                _value(words, zeros, scale, row, field, 1, BITS, SYM),
                _value(words, zeros, scale, row, field, 3, BITS, SYM),
            )
            four = tl.reshape(tl.join(even, odd), (THREADS, 4)).to(weight.dtype.element_ty)
            tl.store(target + (row * FEATURES + field) * columns, four, mask=inside[:, None])


@triton.jit
def _value(
    words,
    zeros,
    scale,
    ROW: tl.constexpr,
    FIELD: tl.constexpr,
    COLUMN: tl.constexpr,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
):
    """One weight of each thread, float32: of one of its four columns."""
    WORDS: tl.constexpr = row_words(BITS)
    word0 = words[4 * ROW * WORDS + COLUMN]
    word1 = words[4 * (ROW * WORDS + WORDS // 2) + COLUMN]
    word2 = words[4 * (ROW * WORDS + WORDS - 1) + COLUMN]
    level = field_value(word0, word1, word2, FIELD, BITS).to(tl.float32)
    zero = 2.0 ** (BITS - 1) if SYM else field_number(zeros, COLUMN, BITS)
    return (level - zero) * four_halves(scale, COLUMN)


def dequantize_triton(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool, dtype: torch.dtype
) -> Tensor:
    columns = qweight.shape[1]
    in_features = qweight.shape[0] * 32 // bits
    features = row_features(bits)
    weight = torch.empty(in_features, columns, dtype=dtype, device=qweight.device)
    rows_per_group = group_size // features
    rows = next(rows for rows in (4, 2, 1) if rows * features <= 32 and rows_per_group % rows == 0)
    with torch.cuda.device_of(qweight):
        _dequantize_kernel[(in_features // features // rows, ceil_div(columns, 4 * _THREADS))](
            qweight,
            qzeros,
            scales,
            weight,
            columns,
            rows_per_group,
            BITS=bits,
            SYM=sym,
            ROWS=rows,
            THREADS=_THREADS,
            num_warps=_THREADS // 32,
        )
    return weight
