"""Triton kernel of `lkq_hf.kernels.compact_segments`: a thread block copies what is kept of a few entries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, next_power_of_2
from lkq_hf.kernels.launch import Launch

_BLOCK_ENTRIES = 32


def compact_segments_triton(
    keep: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    starts: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_positions: Tensor,
) -> None:
    batch, kv_heads, n = keep.shape
    if n == 0:
        return
    keep = keep.contiguous()
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    _launch(
        key.device,
        (ceil_div(n, _BLOCK_ENTRIES), kv_heads, batch),
        (
            keep.view(torch.uint8),
            keep.cumsum(-1, dtype=torch.int32),
            key,
            value,
            positions,
            starts.contiguous(),
            out_keys,
            out_values,
            out_positions,
            n,
            *key.stride(),
            *value.stride(),
            *positions.stride(),
            *out_keys.stride(),
            *out_values.stride(),
            out_positions.stride(0),
        ),
        {
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_KEY_DIM": next_power_of_2(key_dim),
            "BLOCK_VALUE_DIM": next_power_of_2(value_dim),
            "BLOCK_ENTRIES": _BLOCK_ENTRIES,
        },
        num_warps=4,
    )


@triton.jit(do_not_specialize=["n"])
def _compact_kernel(
    keep,
    kept_up_to,
    key,
    value,
    positions,
    starts,
    out_keys,
    out_values,
    out_positions,
    n,
    key_stride_batch,
    key_stride_head,
    key_stride_entry,
    key_stride_feature,
    value_stride_batch,
    value_stride_head,
    value_stride_entry,
    value_stride_feature,
    positions_stride_batch,
    positions_stride_head,
    positions_stride_entry,
    out_keys_stride_entry,
    out_keys_stride_feature,
    out_values_stride_entry,
    out_values_stride_feature,
    out_positions_stride,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    segment = batch * tl.num_programs(1) + head
    entry = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    kept = tl.load(keep + segment * n + entry, mask=entry < n, other=0) != 0
    if tl.max(kept.to(tl.int32), 0) == 0:
        return
    place = tl.load(starts + segment) + tl.load(kept_up_to + segment * n + entry, mask=kept, other=1) - 1

    position = tl.load(
        positions + batch * positions_stride_batch + head * positions_stride_head + entry * positions_stride_entry,
        mask=kept,
    )
    tl.store(out_positions + place * out_positions_stride, position, mask=kept)

    feature = tl.arange(0, BLOCK_KEY_DIM)[None, :]
    inside = kept[:, None] & (feature < KEY_DIM)
    key += batch * key_stride_batch + head * key_stride_head
    rows = tl.load(key + entry[:, None] * key_stride_entry + feature * key_stride_feature, mask=inside)
    tl.store(out_keys + place[:, None] * out_keys_stride_entry + feature * out_keys_stride_feature, rows, mask=inside)

    feature = tl.arange(0, BLOCK_VALUE_DIM)[None, :]
    inside = kept[:, None] & (feature < VALUE_DIM)
    value += batch * value_stride_batch + head * value_stride_head
    rows = tl.load(value + entry[:, None] * value_stride_entry + feature * value_stride_feature, mask=inside)
    tl.store(
        out_values + place[:, None] * out_values_stride_entry + feature * out_values_stride_feature, rows, mask=inside
    )


_launch = Launch(_compact_kernel)
