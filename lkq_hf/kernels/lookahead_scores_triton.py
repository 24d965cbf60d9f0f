"""Triton kernels of `lkq_hf.kernels.lookahead_scores`.

There are two passes over the keys. The first leaves each row's log-sum-exp over each split of the keys; the second
combines the splits and sums exp(logit - log-sum-exp), or a power of it, down the columns. Keeping the logits instead
of reading the keys again would move more bytes: for Llama-3.1-8B, 4 kB a position written and read back, against 2 kB.
All query rows of a KV head share a tile, so that grouped-query heads fill the tensor cores. Logits are in base 2, as
exp2 is one instruction.

Where all thread blocks fit on the GPU at a time, one launch does both passes: thread blocks of a head wait for each
other in between. The last keys of each split stay in registers meanwhile. For few tokens these are all keys, which are
then read once.
"""

import math
import threading
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, interpreting, multiprocessors, next_power_of_2
from lkq_hf.kernels.launch import Launch
from lkq_hf.kernels.softcap_triton import LOG2_E, base2_logits, logit_scales

_LOG2_E = tl.constexpr(LOG2_E)

_EPOCH = tl.constexpr(4096)
"""What the thread blocks of a head add to its counter in each launch. There are fewer of them."""

_COUNTERS = 65_536
"""Of a device, for all streams and all recorded calls."""


class Tile(NamedTuple):
    """How a launch divides its work.

    Attributes:
        rows, keys: of a tile of logits.
        warps, stages: of the launch.
        programs: thread blocks for each multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


def lookahead_scores_triton(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    row_mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    row_power: float,
    reduce_heads: bool,
    tile: Tile | None = None,
    one_launch: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The scores, and the log-sum-exp of each row over each split, ``[batch, kv_heads, splits, ratio * n]``.

    Args:
        query, key, mask, row_mask, sinks, scaling, softcap, row_power, reduce_heads: of `lookahead_scores`.
        tile: None for the one that suits these shapes.
        one_launch: whether one launch does both passes; None where that is possible.
    """
    batch, heads, n, head_dim = query.shape
    kv_heads, total = key.shape[1:3]
    length, ratio = total - n, heads // kv_heads
    query, key = _unit_stride(query), _unit_stride(key)
    if interpreting() and key.dtype == torch.bfloat16:
        query, key = query.float(), key.float()  # the interpreter's dot takes bfloat16 for integers

    # A group is the rows that share a score: those of all query heads of a KV head, or those of one query head.
    groups, group_rows = (1, ratio * n) if reduce_heads else (ratio, n)
    sizes = batch * kv_heads, groups, group_rows, head_dim, length
    plan = _plan(key.device, key.element_size(), sizes, tile, one_launch)
    splits, row_blocks = plan.grid[1], plan.row_blocks

    # Sinks are one more split of every row.
    all_splits = splits + (sinks is not None)
    partial_lse = torch.empty(batch, kv_heads, all_splits, ratio * n, dtype=torch.float32, device=key.device)
    if sinks is not None:
        partial_lse[:, :, -1] = sinks.flatten(2)
    scores = torch.empty(row_blocks, batch, kv_heads * groups, length, dtype=torch.float32, device=key.device)
    row_offset = None
    if row_mask is not None:
        count = row_mask.sum(-1, keepdim=True).clamp(min=1)
        row_offset = torch.where(row_mask, count.log2(), torch.inf)
    arguments = (
        query,
        key,
        mask if mask is None else mask.contiguous().view(torch.uint8),
        row_offset,
        partial_lse,
        scores,
        _arrivals(key.device, plan.grid[0] * plan.grid[2]) if plan.one_launch else None,
        *logit_scales(scaling, softcap),
        math.log2(group_rows // n) + (math.log2(n) if row_mask is None else 0.0),
        float(row_power),
        n,
        length,
        plan.chunk,
        *query.stride()[:3],
        *key.stride()[:3],
    )
    constants = {
        "SPLITS": next_power_of_2(all_splits),
        "HAS_SINKS": sinks is not None,
        "HAS_POWER": row_power != 1,
        "HAS_SOFTCAP": softcap is not None,
        "KV_HEADS": kv_heads,
        "RATIO": ratio,
        "HEAD_DIM": head_dim,
        "ROW_BLOCKS": row_blocks,
        "GROUPS": groups,
        "BLOCK_D": plan.block_d,
        "BLOCK_ROWS": plan.tile.rows,
        "BLOCK_KEYS": plan.tile.keys,
        "BLOCK_OWN": min(plan.tile.keys, max(16, next_power_of_2(n))),
    }
    options: dict[str, Any] = {"num_warps": plan.tile.warps, "num_stages": plan.tile.stages}
    if plan.one_launch:
        passes = {"FIRST": True, "SECOND": True}
        _launch(key.device, plan.grid, arguments, constants | passes, **options, launch_cooperative_grid=True)
    else:
        for first in (True, False):
            passes = {"FIRST": first, "SECOND": not first}
            _launch(key.device, plan.grid, arguments, constants | passes, **options)
    if row_blocks == 1:
        return scores[0], partial_lse
    scores = scores.sum(0)
    if row_power != 1:
        scores = torch.where(scores == -torch.inf, scores, scores.pow(1 / row_power))
    return scores, partial_lse


class _Plan(NamedTuple):
    """Of a call: ``grid`` is tiles of rows, splits of ``chunk`` keys, and KV heads of all rows of the batch."""

    tile: Tile
    one_launch: bool
    grid: tuple[int, int, int]
    row_blocks: int
    chunk: int
    block_d: int


@lru_cache(maxsize=64)  # the layers of a forward ask for the same
def _plan(
    device: torch.device, element_size: int, sizes: tuple[int, ...], tile: Tile | None, one_launch: bool | None
) -> _Plan:
    kv_heads, groups, group_rows, head_dim, length = sizes
    block_d = max(16, next_power_of_2(head_dim))
    rows = (tile or default_tile(block_d, element_size, group_rows, False)).rows
    row_blocks = ceil_div(group_rows, rows)
    tiles = groups * row_blocks
    if one_launch is None:
        suits = block_d <= 256 and element_size == 2
        one_launch = suits and tiles * kv_heads <= _most_programs(device)
    tile = tile or default_tile(block_d, element_size, group_rows, one_launch)
    # For the interpreter enough for several splits.
    programs = tile.programs * multiprocessors(device) if device.type == "cuda" else 32
    wanted_splits = max(1, programs // (tiles * kv_heads))
    chunk = max(1, ceil_div(ceil_div(length, wanted_splits), tile.keys)) * tile.keys
    return _Plan(tile, one_launch, (tiles, max(1, ceil_div(length, chunk)), kv_heads), row_blocks, chunk, block_d)


class _Arrivals:
    """Counters by which thread blocks of one launch wait for each other.

    They are never reset: each launch adds `_EPOCH` to each of them. Launches on one stream follow each other and may
    share counters. A recorded call has counters of its own, as it may run on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # other streams use them too
        self._taken = 0
        self._of_streams: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def of_stream(self, stream: int, count: int) -> Tensor:
        """``count`` counters, or more, for launches on one stream."""
        found = self._of_streams.get(stream)
        if found is None or len(found) < count:
            found = self._of_streams[stream] = self.new(next_power_of_2(count))
        return found

    def new(self, count: int) -> Tensor:
        """``count`` counters for one call only."""
        with self._lock:
            first, self._taken = self._taken, self._taken + ceil_div(count, 4) * 4
        if first + count > _COUNTERS:
            return torch.zeros(count, dtype=torch.int32, device=self._counters.device)
        return self._counters[first : first + count]


_arrivals_of_devices: dict[torch.device, _Arrivals] = {}


def _arrivals(device: torch.device, count: int) -> Tensor:
    """Counters for a launch on the current stream."""
    if device.type != "cuda":  # interpreted
        return torch.zeros(count, dtype=torch.int32)
    found = _arrivals_of_devices.get(device)
    capturing = torch.cuda.is_current_stream_capturing()
    if found is None and capturing:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if found is None:
        found = _arrivals_of_devices[device] = _Arrivals(device)
    return found.new(count) if capturing else found.of_stream(torch.cuda.current_stream(device).cuda_stream, count)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def default_tile(block_d: int, element_size: int, group_rows: int, one_launch: bool) -> Tile:
    """The tile for these shapes. That of two launches needs 100 kB of shared memory, as the smallest GPUs have."""
    rows = max(16, next_power_of_2(group_rows))
    if element_size == 4:  # float32 dot products have no tensor cores, and large tiles spill registers
        return Tile(min(rows, 32), 16, 4, 2, 1 if one_launch else 2)
    rows, keys = min(rows, 16384 // block_d, 128), min(128, max(64, 8192 // block_d))
    if (
        one_launch
    ):  # two thread blocks of a multiprocessor at a time have to fit: one multiplies, one takes exponentials
        return Tile(rows, 128 if block_d <= 128 else keys, 4, 2, 2)
    return Tile(rows, keys, 4, 3 if block_d <= 128 else 2, 2)


@cache
def _most_programs(device: torch.device) -> int:
    """Thread blocks of one launch that can wait for each other; 0 where its tiles are too large for a GPU.

    They need the registers and the 227 kB of shared memory of Hopper, which Blackwell has in data centers only.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    return multiprocessors(device) if torch.cuda.get_device_capability(device)[0] in (9, 10) else 0


@triton.jit
def _query_tile(
    query,
    n,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """This program's rows of its KV head: their numbers, whether they exist, and their queries."""
    group_rows = RATIO * n // GROUPS
    group = tl.program_id(0) // ROW_BLOCKS
    row_in_group = tl.program_id(0) % ROW_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row_in_group < group_rows
    row = group * group_rows + row_in_group
    batch = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    head = tl.program_id(2) % KV_HEADS * RATIO + row // n
    feature = tl.arange(0, BLOCK_D)
    rows = tl.load(
        query
        + batch * query_stride_batch
        + head[:, None] * query_stride_head
        + (row % n)[:, None] * query_stride_row
        + feature[None, :],
        mask=exists[:, None] & (feature[None, :] < HEAD_DIM),
        other=0.0,
    )
    return row, exists, rows


@triton.jit
def _key_block(
    keys,
    start,
    stop,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Keys ``start`` to ``start + BLOCK_KEYS``, ``[BLOCK_KEYS, BLOCK_D]``; those from ``stop`` on are zero."""
    position = tl.arange(0, BLOCK_KEYS)
    feature = tl.arange(0, BLOCK_D)
    pointers = keys + tl.cast(start, tl.int64) * stride + position[:, None] * stride + feature[None, :]
    if FULL:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=feature[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers, mask=(start + position < stop)[:, None] & (feature[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def _accumulate(maximum, total, logits):
    """Online log-sum-exp over axis 1; a row that has seen no key yet has the maximum -inf."""
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    total = total * tl.exp2(maximum - reference) + tl.sum(tl.exp2(logits - reference[:, None]), 1)
    return new_maximum, total


@triton.jit
def _wait_for_all(counter, splits, last):
    """Waits until the thread blocks of all ``splits`` have come here; what they wrote before can be read after."""
    tl.debug_barrier()
    # Together they add _EPOCH, so that the next launch finds a multiple of it again.
    own = tl.where(last, _EPOCH - splits + 1, 1)
    before = tl.atomic_add(counter, own, sem="acq_rel", scope="gpu")
    until = (before & -_EPOCH) + _EPOCH
    reached = before + own
    while reached - until < 0:  # also where the counter has overflowed
        reached = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _store_scores(
    out,
    mask,
    start,
    stop,
    score,
    row_power,
    HAS_POWER: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Scores of the keys from ``start`` on, of which ``mask`` says which are real."""
    position = start + tl.arange(0, BLOCK_KEYS)
    if HAS_POWER and ROW_BLOCKS == 1:
        score = tl.exp2(tl.log2(score) / row_power)
    if mask is not None:
        real = tl.load(mask + position, mask=position < stop, other=0)
        score = tl.where(real != 0, score, float("-inf"))
    tl.store(out + position, score, mask=position < stop)


@triton.jit(do_not_specialize=["length", "chunk"])
def _scores_kernel(
    query,
    key,
    mask,
    row_offset,
    partial_lse,
    scores,
    counters,
    scale,
    softcap,
    log2_divisor,
    row_power,
    n,
    length,
    chunk,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    key_stride_batch,
    key_stride_head,
    key_stride_position,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_POWER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Both passes, or one of them, over the keys of one split, for one tile of rows of one KV head."""
    row, exists, rows = _query_tile(
        query,
        n,
        query_stride_batch,
        query_stride_head,
        query_stride_row,
        KV_HEADS,
        RATIO,
        HEAD_DIM,
        ROW_BLOCKS,
        GROUPS,
        BLOCK_D,
        BLOCK_ROWS,
    )
    batch = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(2) % KV_HEADS
    keys = key + batch * key_stride_batch + kv_head.to(tl.int64) * key_stride_head
    if mask is not None:
        mask += batch * length
    splits = tl.num_programs(1)
    all_splits = splits
    if HAS_SINKS:
        all_splits += 1
    partial_lse += tl.program_id(2).to(tl.int64) * all_splits * (RATIO * n)

    begin = tl.program_id(1) * chunk
    stop = tl.minimum(begin + chunk, length)
    last_tile = begin + tl.maximum(tl.cdiv(stop - begin, BLOCK_KEYS) - 1, 0) * BLOCK_KEYS
    position = tl.arange(0, BLOCK_KEYS)
    last = tl.program_id(1) == splits - 1

    if FIRST:
        maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        if last:  # the rows' own keys too, of which each row sees those up to itself
            own = tl.arange(0, BLOCK_OWN)
            for start in range(0, n, BLOCK_OWN):
                block_of_own = _key_block(
                    keys, length + start, length + n, key_stride_position, HEAD_DIM, BLOCK_D, BLOCK_OWN, False
                )
                products = tl.dot(rows, tl.trans(block_of_own), input_precision="ieee")
                logits_of_own = base2_logits(products, scale, softcap, HAS_SOFTCAP)
                seen = start + own[None, :] <= (row % n)[:, None]
                maximum, total = _accumulate(maximum, total, tl.where(seen, logits_of_own, float("-inf")))
        for start in range(begin, last_tile, BLOCK_KEYS):
            block = _key_block(keys, start, stop, key_stride_position, HEAD_DIM, BLOCK_D, BLOCK_KEYS, True)
            logits = base2_logits(tl.dot(rows, tl.trans(block), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
            if mask is not None:
                real = tl.load(mask + start + position)
                logits = tl.where(real[None, :] != 0, logits, float("-inf"))
            maximum, total = _accumulate(maximum, total, logits)

        block = _key_block(keys, last_tile, stop, key_stride_position, HEAD_DIM, BLOCK_D, BLOCK_KEYS, False)
        logits = base2_logits(tl.dot(rows, tl.trans(block), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        visible = last_tile + position < stop
        if mask is not None:
            visible = visible & (tl.load(mask + last_tile + position, mask=visible, other=0) != 0)
        logits = tl.where(visible[None, :], logits, float("-inf"))
        before = maximum
        maximum = tl.maximum(before, tl.max(logits, 1))
        reference = tl.where(maximum == float("-inf"), 0.0, maximum)
        exponentials = tl.exp2(logits - reference[:, None])
        total = total * tl.exp2(before - reference) + tl.sum(exponentials, 1)

        lse = (maximum + tl.log2(total)) / _LOG2_E  # -inf where the split is all padding
        tl.store(partial_lse + tl.program_id(1) * (RATIO * n) + row, lse, mask=exists)

    if FIRST and SECOND:
        _wait_for_all(counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), splits, last)

    if SECOND:
        # The mean costs nothing: its divisor is part of the exponent, and a row that does not count has the exponent
        # -inf.
        split = tl.arange(0, SPLITS)
        partial = _LOG2_E * tl.load(
            partial_lse + split[:, None] * (RATIO * n) + row[None, :],
            mask=(split < all_splits)[:, None] & exists[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        largest = tl.where(exists, tl.max(partial, 0), 0.0)
        offset = largest + tl.log2(tl.sum(tl.exp2(partial - largest[None, :]), 0))
        if HAS_POWER:
            offset *= row_power
        offset += log2_divisor
        if row_offset is not None:
            offset += tl.load(row_offset + batch * n + row % n)
        offset = tl.where(exists, offset, float("inf"))

        group = tl.program_id(0) // ROW_BLOCKS
        row_block = tl.program_id(0) % ROW_BLOCKS
        batches = tl.num_programs(2) // KV_HEADS
        out = scores + ((row_block * batches + batch) * KV_HEADS * GROUPS + kv_head * GROUPS + group) * length
        first_tile = last_tile
        if FIRST:
            # The last tile is still here.
            if HAS_POWER:
                kept = tl.exp2(logits * row_power - offset[:, None])
            else:
                kept = exponentials * tl.exp2(reference - offset)[:, None]
            score = tl.sum(kept, 0)
            _store_scores(out, mask, last_tile, stop, score, row_power, HAS_POWER, ROW_BLOCKS, BLOCK_KEYS)
            first_tile -= BLOCK_KEYS
        columns = tl.trans(rows)
        # Backwards, as the end of the chunk was read last and is the part that the L2 cache still holds.
        tiles = (first_tile - begin) // BLOCK_KEYS + 1
        for i in range(0, tiles):
            start = first_tile - i * BLOCK_KEYS
            block = _key_block(keys, start, stop, key_stride_position, HEAD_DIM, BLOCK_D, BLOCK_KEYS, FIRST)
            upright = base2_logits(tl.dot(block, columns, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
            if HAS_POWER:
                upright *= row_power
            score = tl.sum(tl.exp2(upright - offset[None, :]), 1)
            _store_scores(out, mask, start, stop, score, row_power, HAS_POWER, ROW_BLOCKS, BLOCK_KEYS)


_launch = Launch(_scores_kernel)
