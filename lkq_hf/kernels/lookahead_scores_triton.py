"""Triton kernels of `lkq_hf.kernels.lookahead_scores`.

The keys are read twice. The first pass leaves each row's log-sum-exp over each split of the keys; the second combines
the splits and sums exp(logit - log-sum-exp), or a power of it, down the columns. Keeping the logits instead of reading
the keys again would move more bytes: for Llama-3.1-8B, 4 kB a position written and read back, against 2 kB. All query
rows of a KV head share a tile, so that grouped-query heads fill the tensor cores. Logits are in base 2, as exp2 is one
instruction.

One launch for both passes, whose thread blocks wait for each other in between, was tried on an H200: for Llama-3.1-8B
it was at most 4 us faster up to 8,192 tokens, and at least 5 us slower from 32,768.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, interpreting, multiprocessors, next_power_of_2
from lkq_hf.kernels.launch import Launch
from lkq_hf.kernels.softcap_triton import LOG2_E, base2_logits, logit_scales

_LOG2_E = tl.constexpr(LOG2_E)


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
) -> tuple[Tensor, Tensor]:
    """The scores, and the log-sum-exp of each row over each split, ``[batch, kv_heads, splits, ratio * n]``."""
    batch, heads, n, head_dim = query.shape
    kv_heads, total = key.shape[1:3]
    length, ratio = total - n, heads // kv_heads
    query, key = _unit_stride(query), _unit_stride(key)
    if interpreting() and key.dtype == torch.bfloat16:
        query, key = query.float(), key.float()  # the interpreter's dot takes bfloat16 for integers

    # A group is the rows that share a score: those of all query heads of a KV head, or those of one query head.
    groups, group_rows = (1, ratio * n) if reduce_heads else (ratio, n)
    plan = _plan(key.device, key.element_size(), batch * kv_heads, groups, group_rows, head_dim, length)
    splits, row_blocks = plan.grid[1], plan.row_blocks

    # Sinks are one more split of every row.
    all_splits = splits + (sinks is not None)
    partial_lse = torch.empty(all_splits, batch, kv_heads, ratio * n, dtype=torch.float32, device=key.device)
    if sinks is not None:
        partial_lse[-1] = sinks.flatten(2)
    scores = torch.empty(row_blocks, batch, kv_heads * groups, length, dtype=torch.float32, device=key.device)
    row_offset = None
    if row_mask is not None:
        count = row_mask.sum(-1, keepdim=True).clamp(min=1)
        row_offset = torch.where(row_mask, count.log2(), torch.inf)
    log2_divisor = math.log2(group_rows // n) + (math.log2(n) if row_mask is None else 0.0)
    inputs: tuple[Any, ...] = (
        query,
        key,
        mask if mask is None else mask.contiguous().view(torch.uint8),
        *logit_scales(scaling, softcap),
        n,
        length,
        plan.chunk,
        *query.stride()[:3],
        *key.stride()[:3],
        partial_lse,
    )
    constants = {
        "KV_HEADS": kv_heads,
        "RATIO": ratio,
        "HEAD_DIM": head_dim,
        "ROW_BLOCKS": row_blocks,
        "GROUPS": groups,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_D": plan.block_d,
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_KEYS": plan.block_keys,
    }
    options: dict[str, Any] = {"num_warps": 4, "num_stages": plan.num_stages}
    _launch_partial_lse(key.device, plan.grid, inputs, constants, **options)
    inputs += (row_offset, log2_divisor, float(row_power), scores)
    more = {"SPLITS": next_power_of_2(all_splits), "HAS_SINKS": sinks is not None, "HAS_POWER": row_power != 1}
    _launch_column_mean(key.device, plan.grid, inputs, constants | more, **options)
    partial_lse = partial_lse.movedim(0, 2)
    if row_blocks == 1:
        return scores[0], partial_lse
    scores = scores.sum(0)
    if row_power != 1:
        scores = torch.where(scores == -torch.inf, scores, scores.pow(1 / row_power))
    return scores, partial_lse


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Plan(NamedTuple):
    """How both launches of a call divide their work.

    Attributes:
        grid: tiles of rows, splits of the keys, and KV heads of all rows of the batch.
        row_blocks: tiles of the rows that share a score.
        chunk: keys of a split.
        block_rows, block_keys, block_d: of a tile.
        num_stages: of the pipeline that loads keys.
    """

    grid: tuple[int, int, int]
    row_blocks: int
    chunk: int
    block_rows: int
    block_keys: int
    block_d: int
    num_stages: int


@lru_cache(maxsize=64)  # the layers of a forward ask for the same
def _plan(
    device: torch.device, element_size: int, kv_heads: int, groups: int, group_rows: int, head_dim: int, length: int
) -> _Plan:
    block_d = max(16, next_power_of_2(head_dim))
    block_rows, block_keys, num_stages = _tile_sizes(block_d, element_size, group_rows)
    row_blocks = ceil_div(group_rows, block_rows)
    tiles = groups * row_blocks
    wanted_splits = max(1, _resident_programs(device) // (tiles * kv_heads))
    chunk = max(1, ceil_div(ceil_div(length, wanted_splits), block_keys)) * block_keys
    grid = tiles, max(1, ceil_div(length, chunk)), kv_heads
    return _Plan(grid, row_blocks, chunk, block_rows, block_keys, block_d, num_stages)


def _tile_sizes(block_d: int, element_size: int, group_rows: int) -> tuple[int, int, int]:
    """Rows, keys and pipeline stages of a tile, for the 100 kB of shared memory of the smallest supported GPUs."""
    rows = max(16, next_power_of_2(group_rows))
    if element_size == 4:  # float32 dot products have no tensor cores, and large tiles spill registers
        return min(rows, 32), 16, 2
    return min(rows, 16384 // block_d, 128), min(128, max(64, 8192 // block_d)), 3 if block_d <= 128 else 2


def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 32  # interpreted: enough for several splits
    return 2 * multiprocessors(device)


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


@triton.jit(do_not_specialize=["length", "chunk"])
def _partial_lse_kernel(
    query,
    key,
    mask,
    scale,
    softcap,
    n,
    length,
    chunk,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    key_stride_batch,
    key_stride_head,
    key_stride_position,
    partial_lse,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
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
    keys = key + batch * key_stride_batch + (tl.program_id(2) % KV_HEADS).to(tl.int64) * key_stride_head
    begin = tl.program_id(1) * chunk
    stop = tl.minimum(begin + chunk, length)
    full_stop = begin + (stop - begin) // BLOCK_KEYS * BLOCK_KEYS
    last = tl.program_id(1) == tl.num_programs(1) - 1
    position = tl.arange(0, BLOCK_KEYS)

    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(begin, full_stop, BLOCK_KEYS):
        block = _key_block(keys, start, stop, key_stride_position, HEAD_DIM, BLOCK_D, BLOCK_KEYS, True)
        logits = base2_logits(tl.dot(rows, tl.trans(block), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        if mask is not None:
            real = tl.load(mask + batch * length + start + position)
            logits = tl.where(real[None, :] != 0, logits, float("-inf"))
        maximum, total = _accumulate(maximum, total, logits)

    # The last split goes on to the rows' own keys, of which each row sees those up to itself.
    tail_stop = tl.where(last, length + n, full_stop)
    for start in range(full_stop, tail_stop, BLOCK_KEYS):
        block = _key_block(keys, start, tail_stop, key_stride_position, HEAD_DIM, BLOCK_D, BLOCK_KEYS, False)
        logits = base2_logits(tl.dot(rows, tl.trans(block), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        visible = (start + position)[None, :] <= length + (row % n)[:, None]
        if mask is not None:
            in_prompt = start + position < length
            real = tl.load(mask + batch * length + start + position, mask=in_prompt, other=1)
            visible = visible & (real != 0)[None, :]
        maximum, total = _accumulate(maximum, total, tl.where(visible, logits, float("-inf")))

    lse = (maximum + tl.log2(total)) / _LOG2_E  # -inf where the split is all padding
    split = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    tl.store(partial_lse + split * (RATIO * n) + row, lse, mask=exists)


_launch_partial_lse = Launch(_partial_lse_kernel)


@triton.jit(do_not_specialize=["length", "chunk"])
def _column_mean_kernel(
    query,
    key,
    mask,
    scale,
    softcap,
    n,
    length,
    chunk,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    key_stride_batch,
    key_stride_head,
    key_stride_position,
    partial_lse,
    row_offset,
    log2_divisor,
    row_power,
    scores,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_POWER: tl.constexpr,
):
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
    begin = tl.program_id(1) * chunk
    stop = tl.minimum(begin + chunk, length)

    # The mean costs nothing: its divisor is part of the exponent, and a row that does not count has the exponent -inf.
    splits = tl.num_programs(1)
    if HAS_SINKS:
        splits += 1
    split = tl.arange(0, SPLITS)
    partial = _LOG2_E * tl.load(
        partial_lse + (split * tl.num_programs(2) + tl.program_id(2))[:, None] * (RATIO * n) + row[None, :],
        mask=(split < splits)[:, None] & exists[None, :],
        other=float("-inf"),
    )
    maximum = tl.where(exists, tl.max(partial, 0), 0.0)
    offset = maximum + tl.log2(tl.sum(tl.exp2(partial - maximum[None, :]), 0))
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
    position = tl.arange(0, BLOCK_KEYS)
    columns = tl.trans(rows)
    # Backwards, as the end of the chunk was read last and is the part that the L2 cache still holds.
    blocks = tl.cdiv(stop - begin, BLOCK_KEYS)
    for i in range(0, blocks):
        start = begin + (blocks - 1 - i) * BLOCK_KEYS
        block = _key_block(keys, start, stop, key_stride_position, HEAD_DIM, BLOCK_D, BLOCK_KEYS, False)
        logits = base2_logits(tl.dot(block, columns, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        if HAS_POWER:
            logits *= row_power
        score = tl.sum(tl.exp2(logits - offset[None, :]), 1)
        if HAS_POWER and ROW_BLOCKS == 1:
            score = tl.exp2(tl.log2(score) / row_power)
        inside = start + position < stop
        if mask is not None:
            real = tl.load(mask + batch * length + start + position, mask=inside, other=0)
            score = tl.where(real != 0, score, float("-inf"))
        tl.store(out + start + position, score, mask=inside)


_launch_column_mean = Launch(_column_mean_kernel)
