"""The Triton kernel of `lkq_hf.kernels.dequantize.dequantize`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div
from lkq_hf.kernels.packed_fields_triton import field_value, load_words, load_zeros, row_features, row_words


@triton.jit
def _dequantize_kernel(
    qweight,
    qzeros,
    scales,
    weight,
    columns,
    packed_rows,
    rows_per_group,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    FEATURES: tl.constexpr = row_features(BITS)
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (row < packed_rows) & (column < columns)
    words = qweight + row * (row_words(BITS) * columns) + column
    word0, word1, word2 = load_words(words, mask, columns, BITS)
    group = row // rows_per_group
    scale = tl.load(scales + group * columns + column, mask=mask, other=0.0).to(tl.float32)
    if SYM:
        zero = 2.0 ** (BITS - 1)
    else:
        zero = load_zeros(qzeros, group, column, mask, columns, BITS)
    target = weight + (row * FEATURES).to(tl.int64) * columns + column
    for field in tl.static_range(FEATURES):
        value = (field_value(word0, word1, word2, field, BITS).to(tl.float32) - zero) * scale
        tl.store(target + field * columns, value.to(weight.dtype.element_ty), mask=mask)


def dequantize_triton(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, sym: bool, dtype: torch.dtype
) -> Tensor:
    columns = qweight.shape[1]
    in_features = qweight.shape[0] * 32 // bits
    features = row_features(bits)
    weight = torch.empty(in_features, columns, dtype=dtype, device=qweight.device)
    block_rows, block_n = 4, 128
    with torch.cuda.device_of(qweight):
        _dequantize_kernel[(ceil_div(in_features // features, block_rows), ceil_div(columns, block_n))](
            qweight,
            qzeros,
            scales,
            weight,
            columns,
            in_features // features,
            group_size // features,
            BITS=bits,
            SYM=sym,
            BLOCK_ROWS=block_rows,
            BLOCK_N=block_n,
        )
    return weight
