"""Tiles of keys and values, for kernels that attend to entries."""

import triton
import triton.language as tl


@triton.jit
def load_keys_and_values(
    key,
    value,
    entry,
    stop,
    key_stride,
    value_stride,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """Keys, `[features, entries]`, and values, `[entries, features]`, of the entries before ``stop``; 0 elsewhere."""
    feature = tl.arange(0, BLOCK_HEAD_DIM)
    value_feature = tl.arange(0, BLOCK_VALUE_DIM)
    place = entry.to(tl.int64)
    keys = tl.load(
        key + place[None, :] * key_stride + feature[:, None],
        mask=(entry < stop)[None, :] & (feature < HEAD_DIM)[:, None],
        other=0.0,
    )
    values = tl.load(
        value + place[:, None] * value_stride + value_feature[None, :],
        mask=(entry < stop)[:, None] & (value_feature < VALUE_DIM)[None, :],
        other=0.0,
    )
    return keys, values
