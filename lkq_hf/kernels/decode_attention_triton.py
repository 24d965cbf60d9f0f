"""Triton kernels of `lkq_hf.kernels.decode_attention`: one for parts of the entries, one that puts them together.

Online softmax over tiles of entries (Dao et al., arXiv 2205.14135), each thread block with a share of the entries of
one KV head, so that one token too keeps the whole GPU reading.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lkq_hf.kernels.dispatch import ceil_div, dependent_launch, interpreting, multiprocessors, next_power_of_2
from lkq_hf.kernels.tiles_triton import load_keys_and_values

_BLOCK_SLOTS = 64
_BLOCKS_PER_MULTIPROCESSOR = 8
_MOST_COMBINED = 16384  # values that one thread block puts together
_WARPS = 4
_LEAST_ROWS = 16  # of a tile that the tensor cores multiply


def decode_attention_triton(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    batch, heads, _, head_dim = query.shape
    kv_heads, slots, value_dim = value.shape[1:]
    groups = heads // kv_heads
    tiles = ceil_div(slots, _BLOCK_SLOTS)
    splits = min(
        tiles,
        ceil_div(_BLOCKS_PER_MULTIPROCESSOR * multiprocessors(query.device), batch * kv_heads),
        _MOST_COMBINED // next_power_of_2(value_dim),
    )
    mask = mask.expand(batch, 1, 1, slots)
    output = query.new_empty(batch, heads, 1, value_dim)
    if interpreting() and key.dtype == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()  # its dot takes bfloat16 for integers
    partial = query.new_empty(batch * heads, splits, value_dim, dtype=torch.float32)
    # The largest logit, and the sum of the exponentials relative to it.
    statistics = query.new_empty(batch * heads, splits, 2, dtype=torch.float32)
    launch = dependent_launch(query.device)
    with torch.cuda.device_of(query):
        _attend_kernel[(splits, kv_heads, batch)](
            query,
            key,
            value,
            mask.view(torch.uint8),
            partial,
            statistics,
            slots,
            tiles,
            scaling * math.log2(math.e),
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            mask.stride(0),
            GROUPS=groups,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_GROUPS=max(_LEAST_ROWS, next_power_of_2(groups)),
            BLOCK_SLOTS=_BLOCK_SLOTS,
            BLOCK_HEAD_DIM=max(16, next_power_of_2(head_dim)),
            BLOCK_VALUE_DIM=max(16, next_power_of_2(value_dim)),
            DEPENDENT=bool(launch),
            num_warps=_WARPS,
            **launch,
        )
        _combine_kernel[(batch * heads,)](
            partial,
            statistics,
            output,
            splits,
            VALUE_DIM=value_dim,
            BLOCK_SPLITS=next_power_of_2(splits),
            BLOCK_VALUE_DIM=next_power_of_2(value_dim),
            DEPENDENT=bool(launch),
            num_warps=4,
            **launch,
        )
    return output


@triton.jit(do_not_specialize=["slots", "tiles"])
def _attend_kernel(
    query,
    key,
    value,
    mask,
    partial,
    statistics,
    slots,
    tiles,
    scaling,
    query_stride_batch,
    query_stride_head,
    key_stride_batch,
    key_stride_head,
    key_stride_slot,
    value_stride_batch,
    value_stride_head,
    value_stride_slot,
    mask_stride_batch,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One KV head's share of the entries, for the heads of its group."""
    split, kv_head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)
    feature = tl.arange(0, BLOCK_HEAD_DIM)
    value_feature = tl.arange(0, BLOCK_VALUE_DIM)
    head = kv_head * GROUPS + group
    if DEPENDENT:
        gdc_wait()
    rows = tl.load(
        query + batch * query_stride_batch + head[:, None] * query_stride_head + feature[None, :],
        mask=(group < GROUPS)[:, None] & (feature < HEAD_DIM)[None, :],
        other=0.0,
    )
    key += batch * key_stride_batch + kv_head * key_stride_head
    value += batch * value_stride_batch + kv_head * value_stride_head
    mask += batch * mask_stride_batch

    largest = tl.full((BLOCK_GROUPS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUPS,), tl.float32)
    sums = tl.zeros((BLOCK_GROUPS, BLOCK_VALUE_DIM), tl.float32)
    # Programs take tiles in turn: the visible entries may all lie at one end.
    for tile in range(split, tiles, tl.num_programs(0)):
        slot = tile * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
        seen = tl.load(mask + slot, mask=slot < slots, other=0) != 0
        if tl.max(seen.to(tl.int32), 0) != 0:
            keys, values = load_keys_and_values(
                key,
                value,
                slot,
                slots,
                key_stride_slot,
                value_stride_slot,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_HEAD_DIM,
                BLOCK_VALUE_DIM,
            )
            logits = tl.dot(rows, keys, input_precision="ieee") * scaling
            logits = tl.where(seen[None, :], logits, float("-inf"))
            # Finite, since something of this tile is seen.
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            weights = tl.exp2(logits - new_largest[:, None])
            kept = tl.exp2(largest - new_largest)
            total = total * kept + tl.sum(weights, 1)
            sums = sums * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            largest = new_largest
    if DEPENDENT:
        gdc_launch_dependents()
    # Heads of a batch follow each other.
    row = (batch * tl.num_programs(1) * GROUPS + head) * tl.num_programs(0) + split
    tl.store(
        partial + row[:, None] * VALUE_DIM + value_feature[None, :],
        sums,
        mask=(group < GROUPS)[:, None] & (value_feature < VALUE_DIM)[None, :],
    )
    tl.store(statistics + 2 * row, largest, mask=group < GROUPS)
    tl.store(statistics + 2 * row + 1, total, mask=group < GROUPS)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    partial,
    statistics,
    output,
    splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A head's parts, each relative to its own largest logit, put together."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    feature = tl.arange(0, BLOCK_VALUE_DIM)
    place = row * splits + split
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    largest = tl.load(statistics + 2 * place, mask=split < splits, other=float("-inf"))
    total = tl.load(statistics + 2 * place + 1, mask=split < splits, other=0.0)
    sums = tl.load(
        partial + place[:, None] * VALUE_DIM + feature[None, :],
        mask=(split < splits)[:, None] & (feature < VALUE_DIM)[None, :],
        other=0.0,
    )
    # Not minus infinity where nothing is seen at all: every weight is then 0, not NaN.
    over_all = tl.maximum(tl.max(largest, 0), -1e30)
    weight = tl.exp2(largest - over_all)
    denominator = tl.sum(weight * total, 0)
    result = tl.sum(weight[:, None] * sums, 0) / tl.where(denominator == 0.0, 1.0, denominator)
    tl.store(output + row * VALUE_DIM + feature, result.to(output.dtype.element_ty), mask=feature < VALUE_DIM)
