"""Triton kernels of `lkq_hf.kernels.select_compact`: one that selects, one that copies."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, next_power_of_2


def select_compact_triton(
    scores: Tensor, key: Tensor, value: Tensor, k: int, out: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, length = scores.shape
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    if out is None:
        out = key.new_empty(batch, kv_heads, k, key_dim), value.new_empty(batch, kv_heads, k, value_dim)
    indices = torch.empty(batch, kv_heads, k, dtype=torch.int64, device=scores.device)

    block = next_power_of_2(length)
    one_block = block <= 16384
    if not one_block:
        block = 8192
    block_positions = 32
    with torch.cuda.device_of(key):
        _select_kernel[(batch * kv_heads,)](
            scores.contiguous(),
            indices,
            length,
            k,
            BLOCK=block,
            ONE_BLOCK=one_block,
            num_warps=max(4, min(32, block // 512)),
        )
        _copy_kernel[(ceil_div(k, block_positions), batch * kv_heads)](
            indices,
            key,
            value,
            *out,
            k,
            kv_heads,
            *key.stride(),
            *value.stride(),
            *out[0].stride(),
            *out[1].stride(),
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            BLOCK_KEY_DIM=next_power_of_2(key_dim),
            BLOCK_VALUE_DIM=next_power_of_2(value_dim),
            BLOCK_POSITIONS=block_positions,
            num_warps=4,
        )
    return *out, indices


@triton.jit
def _load_ordered(scores, start, length, BLOCK: tl.constexpr):
    """Scores as integers of the same order, so that a threshold can be bisected bit by bit."""
    position = start + tl.arange(0, BLOCK)
    score = tl.load(scores + position, mask=position < length, other=float("-inf"))
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # adding zero makes -0.0 equal to 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["length", "k"])
def _select_kernel(scores, indices, length, k, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """The positions of the ``k`` largest scores of a row, ascending.

    Bisects the threshold: ``lower`` is always reached by at least k scores, ``upper`` by ``above`` <= k. It ends
    early when a threshold is reached by exactly k, after about log2(spacing of the scores) steps rather than 32.
    A row that fits into one block is read once and stays in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * length
    indices += row * k

    lower = tl.full([], -0x7F800001, tl.int32)  # -inf
    upper = tl.full([], 0x7F800001, tl.int32)  # above +inf
    above = tl.full([], 0, tl.int32)
    if ONE_BLOCK:
        whole = _load_ordered(scores, 0, length, BLOCK)
    while (above < k) & (lower < upper - 1):
        middle = (lower >> 1) + (upper >> 1) + (lower & upper & 1)  # without overflow
        if ONE_BLOCK:
            reached = (whole >= middle).to(tl.int32)
        else:
            reached = tl.zeros([BLOCK], tl.int32)
            for start in range(0, length, BLOCK):
                reached += (_load_ordered(scores, start, length, BLOCK) >= middle).to(tl.int32)
        count = tl.sum(reached, 0)
        if count > k:
            lower = middle
        else:
            upper = middle
            above = count

    # Every score from upper on is kept, and the first of those equal to lower until there are k.
    written = tl.full([], 0, tl.int32)
    ties_left = k - above
    for start in range(0, length, BLOCK):
        if ONE_BLOCK:
            ordered = whole
        else:
            ordered = _load_ordered(scores, start, length, BLOCK)
        position = start + tl.arange(0, BLOCK)
        keep = (ordered >= upper).to(tl.int32)
        tie = ((ordered == lower) & (position < length)).to(tl.int32)
        # Both running counts in one scan.
        packed = tl.cumsum(keep | (tie << 16), 0)
        kept_before = (packed & 0xFFFF) - keep
        ties_before = (packed >> 16) - tie
        selected = (keep == 1) | ((tie == 1) & (ties_before < ties_left))
        slot = written + kept_before + tl.minimum(ties_before, ties_left)
        tl.store(indices + slot, position.to(tl.int64), mask=selected)
        ties = tl.minimum(tl.sum(tie, 0), ties_left)
        written += tl.sum(keep, 0) + ties
        ties_left -= ties


@triton.jit(do_not_specialize=["k"])
def _copy_kernel(
    indices,
    key,
    value,
    out_key,
    out_value,
    k,
    kv_heads,
    key_stride_batch,
    key_stride_head,
    key_stride_position,
    key_stride_feature,
    value_stride_batch,
    value_stride_head,
    value_stride_position,
    value_stride_feature,
    out_key_stride_batch,
    out_key_stride_head,
    out_key_stride_position,
    out_key_stride_feature,
    out_value_stride_batch,
    out_value_stride_head,
    out_value_stride_position,
    out_value_stride_feature,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    exists = (slot < k)[:, None]
    source = tl.load(indices + tl.program_id(1).to(tl.int64) * k + slot, mask=slot < k, other=0)[:, None]
    slot = slot[:, None].to(tl.int64)

    feature = tl.arange(0, BLOCK_KEY_DIM)[None, :]
    inside = exists & (feature < KEY_DIM)
    key += batch * key_stride_batch + head * key_stride_head
    kept = tl.load(key + source * key_stride_position + feature * key_stride_feature, mask=inside)
    out_key += batch * out_key_stride_batch + head * out_key_stride_head
    tl.store(out_key + slot * out_key_stride_position + feature * out_key_stride_feature, kept, mask=inside)

    feature = tl.arange(0, BLOCK_VALUE_DIM)[None, :]
    inside = exists & (feature < VALUE_DIM)
    value += batch * value_stride_batch + head * value_stride_head
    kept = tl.load(value + source * value_stride_position + feature * value_stride_feature, mask=inside)
    out_value += batch * out_value_stride_batch + head * out_value_stride_head
    tl.store(out_value + slot * out_value_stride_position + feature * out_value_stride_feature, kept, mask=inside)
