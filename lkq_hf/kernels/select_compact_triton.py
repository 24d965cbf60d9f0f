"""Triton kernels of `lkq_hf.kernels.select_compact`: one that selects, one that copies."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, next_power_of_2
from lkq_hf.kernels.launch import Launch

_LARGEST_BLOCK = 16384
"""Scores that stay in the registers of one thread block."""

_PIECE = 8192
"""Scores of a piece, where a row has more than that."""


def select_compact_triton(
    scores: Tensor, key: Tensor, value: Tensor, k: int, labels: Tensor | None, out: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, length = scores.shape
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    device = key.device
    if out is None:
        out = key.new_empty(batch, kv_heads, k, key_dim), value.new_empty(batch, kv_heads, k, value_dim)
    out_key, out_value = out[:2]
    out_labels, out_scores = out[2:] or (None, None)
    no_strides = 0, 0, 0
    indices = torch.empty(batch, kv_heads, k, dtype=torch.int64, device=device)
    scores = scores.contiguous()

    pieces = ceil_div(length, _PIECE)
    if length > _LARGEST_BLOCK and 2 * pieces * k <= length:
        # The best of each piece, all pieces at a time, and then the best of these: in the same order, ties too.
        of_pieces = torch.empty(batch, kv_heads, pieces * k, dtype=torch.float32, device=device)
        origin = torch.empty(batch, kv_heads, pieces * k, dtype=torch.int64, device=device)
        _select(scores, None, origin, of_pieces, length, _PIECE, k)
        _select(of_pieces, origin, indices, None, pieces * k, pieces * k, k)
    else:
        _select(scores, None, indices, None, length, length, k)

    block_positions = 32
    _launch_copy(
        device,
        (ceil_div(k, block_positions), batch * kv_heads, 1),
        (
            indices,
            key,
            value,
            out_key,
            out_value,
            labels,
            scores,
            out_labels,
            out_scores,
            k,
            length,
            kv_heads,
            *key.stride(),
            *value.stride(),
            *out_key.stride(),
            *out_value.stride(),
            *(no_strides if labels is None else labels.stride()),
            *(no_strides if out_labels is None else out_labels.stride()),
            *(no_strides if out_scores is None else out_scores.stride()),
        ),
        {
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_KEY_DIM": next_power_of_2(key_dim),
            "BLOCK_VALUE_DIM": next_power_of_2(value_dim),
            "BLOCK_POSITIONS": block_positions,
        },
        num_warps=4,
    )
    return out_key, out_value, indices


def _select(
    scores: Tensor, origin: Tensor | None, indices: Tensor, kept: Tensor | None, length: int, piece: int, k: int
) -> None:
    """Writes the places of the ``k`` best of each piece of each row, and their scores to ``kept``."""
    block = next_power_of_2(piece)
    one_block = block <= _LARGEST_BLOCK
    if not one_block:
        block = _PIECE
    _launch_select(
        scores.device,
        (ceil_div(length, piece), scores.shape[0] * scores.shape[1], 1),
        (scores, origin, indices, kept, length, piece, k),
        {"BLOCK": block, "ONE_BLOCK": one_block},
        num_warps=max(4, min(32, block // 512)),
    )


@triton.jit
def _load_ordered(scores, start, length, BLOCK: tl.constexpr):
    """Scores as integers of the same order, so that a threshold can be bisected bit by bit."""
    position = start + tl.arange(0, BLOCK)
    score = tl.load(scores + position, mask=position < length, other=float("-inf"))
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # adding zero makes -0.0 equal to 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _reached(ordered, low, middle, high):
    """How many of three thresholds each score reaches: one count for each, 21 bits apart, to be summed at once."""
    reach_low = (ordered >= low.to(tl.int32)).to(tl.int64)
    reach_middle = (ordered >= middle.to(tl.int32)).to(tl.int64)
    reach_high = (ordered >= high.to(tl.int32)).to(tl.int64)
    return reach_low + (reach_middle << 21) + (reach_high << 42)


@triton.jit(do_not_specialize=["length", "piece", "k"])
def _select_kernel(scores, origin, indices, kept, length, piece, k, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """The places of the ``k`` largest scores of a piece of a row, ascending.

    Narrows the threshold down, to a quarter in each step: ``lower`` is always reached by at least k scores, ``upper``
    by ``above`` <= k. It ends early when a threshold is reached by exactly k, after about log4(spacing of the scores)
    steps rather than 16. A piece that fits into one block is read once and stays in registers.

    A piece of fewer than ``k`` scores has places of minus infinity behind its own. ``origin`` holds what to write for
    a place, where that is not the place itself.
    """
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * piece
    out = (row * tl.num_programs(0) + tl.program_id(0)) * k
    indices += out
    scores += row * length + first
    length_of_row = length
    wanted = k
    length = tl.minimum(length - first, piece)
    k = tl.minimum(k, length)

    lower = tl.full([], -0x7F800001, tl.int64)  # -inf
    upper = tl.full([], 0x7F800001, tl.int64)  # above +inf
    above = tl.full([], 0, tl.int64)
    if ONE_BLOCK:
        whole = _load_ordered(scores, 0, length, BLOCK)
    while (above < k) & (lower < upper - 1):
        low = lower + ((upper - lower) >> 2)
        middle = lower + ((upper - lower) >> 1)
        high = lower + ((3 * (upper - lower)) >> 2)
        if ONE_BLOCK:
            reached = _reached(whole, low, middle, high)
        else:
            reached = tl.zeros([BLOCK], tl.int64)
            for start in range(0, length, BLOCK):
                reached += _reached(_load_ordered(scores, start, length, BLOCK), low, middle, high)
        counts = tl.sum(reached, 0)
        reach_low, reach_middle, reach_high = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
        if reach_low <= k:
            upper = low
            above = reach_low
        elif reach_middle <= k:
            lower = low
            upper = middle
            above = reach_middle
        elif reach_high <= k:
            lower = middle
            upper = high
            above = reach_high
        else:
            lower = high
    above = above.to(tl.int32)

    # Every score from upper on is kept, and the first of those equal to lower until there are k.
    written = tl.full([], 0, tl.int32)
    ties_left = k - above
    for start in range(0, length, BLOCK):
        if ONE_BLOCK:
            ordered = whole
        else:
            ordered = _load_ordered(scores, start, length, BLOCK)
        position = start + tl.arange(0, BLOCK)
        keep = (ordered >= upper.to(tl.int32)).to(tl.int32)
        tie = ((ordered == lower.to(tl.int32)) & (position < length)).to(tl.int32)
        # Both running counts in one scan.
        packed = tl.cumsum(keep | (tie << 16), 0)
        kept_before = (packed & 0xFFFF) - keep
        ties_before = (packed >> 16) - tie
        selected = (keep == 1) | ((tie == 1) & (ties_before < ties_left))
        slot = written + kept_before + tl.minimum(ties_before, ties_left)
        place = (first + position).to(tl.int64)
        if origin is not None:
            place = tl.load(origin + row * length_of_row + position, mask=selected, other=0)
        tl.store(indices + slot, place, mask=selected)
        if kept is not None:
            best = tl.load(scores + position, mask=selected, other=0.0)
            tl.store(kept + out + slot, best, mask=selected)
        ties = tl.minimum(tl.sum(tie, 0), ties_left)
        written += tl.sum(keep, 0) + ties
        ties_left -= ties
    if kept is not None:
        for start in range(k, wanted, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            tl.store(kept + out + slot, float("-inf"), mask=slot < wanted)
            tl.store(indices + slot, tl.zeros([BLOCK], tl.int64), mask=slot < wanted)


@triton.jit(do_not_specialize=["k", "length"])
def _copy_kernel(
    indices,
    key,
    value,
    out_key,
    out_value,
    labels,
    scores,
    out_labels,
    out_scores,
    k,
    length,
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
    label_stride_batch,
    label_stride_head,
    label_stride_position,
    out_label_stride_batch,
    out_label_stride_head,
    out_label_stride_position,
    out_score_stride_batch,
    out_score_stride_head,
    out_score_stride_position,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    row = tl.program_id(1).to(tl.int64)
    source = tl.load(indices + row * k + slot, mask=slot < k, other=0)
    if labels is not None:
        label = tl.load(
            labels + batch * label_stride_batch + head * label_stride_head + source * label_stride_position,
            mask=slot < k,
        )
        out_labels += batch * out_label_stride_batch + head * out_label_stride_head
        tl.store(out_labels + slot * out_label_stride_position, label, mask=slot < k)
        score = tl.load(scores + row * length + source, mask=slot < k)
        out_scores += batch * out_score_stride_batch + head * out_score_stride_head
        tl.store(out_scores + slot * out_score_stride_position, score, mask=slot < k)
    exists = (slot < k)[:, None]
    source = source[:, None]
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


_launch_select = Launch(_select_kernel)
_launch_copy = Launch(_copy_kernel)
