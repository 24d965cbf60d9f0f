"""Triton kernels of `lkq_hf.kernels.ragged_attention`: one for parts of the segments, one that combines them.

Online softmax over tiles of entries (Dao et al., arXiv 2205.14135). A thread block has some query rows of one (row,
KV head) and a chunk of its prefix or of its tail. Chunks are equally long, so segments of different lengths keep the
whole GPU busy. The grid has room for the longest segment that there may be; thread blocks behind the end of a shorter
one stop at once. Only the device knows the lengths, so one CUDA graph serves every prompt.

Many query rows fill the GPU without chunks. A thread block then reads the whole prefix and tail and writes its output
itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lkq_hf.kernels.dispatch import ceil_div, dependent_launch, interpreting, multiprocessors, next_power_of_2
from lkq_hf.kernels.softcap_triton import LOG2_E, base2_logits, logit_scales
from lkq_hf.kernels.tiles_triton import load_keys_and_values

_LOG2_E = tl.constexpr(LOG2_E)
_LEAST_ROWS = 16  # of a tile that the tensor cores multiply
MOST_COMBINED = 8192
"""Values of parts that a thread block holds at a time."""


class Tile(NamedTuple):
    """How the work is divided.

    Args:
        rows: query rows of a thread block: tokens times heads of a group, rounded up to a power of 2.
        entries: keys that it multiplies with at a time.
        warps: of a thread block.
        stages: tiles of entries under way.
        programs: thread blocks for each multiprocessor if every segment were as long as the longest.
    """

    rows: int
    entries: int
    warps: int
    stages: int
    programs: int


def default_tile(query_rows: int, head_dim: int, element_size: int, entries: int) -> Tile:
    """The tile for so many query rows of a KV head, over at most ``entries`` entries of all heads and rows of a batch.

    It fits into the 100 kB of shared memory and the registers of the smallest GPUs that are supported.
    """
    block_dim = max(16, next_power_of_2(head_dim))
    rows = max(_LEAST_ROWS, next_power_of_2(query_rows))
    if element_size == 4:  # float32 dot products have no tensor cores
        rows = min(rows, 32 if block_dim <= 64 else 16)
        return Tile(rows, entries=16, warps=4 if block_dim <= 64 else 8, stages=2, programs=32)
    rows = min(rows, 64 if block_dim <= 128 else 32)
    if rows == _LEAST_ROWS and block_dim <= 128:
        # Few entries are not worth many parts, whose sums have to be combined.
        programs = min(max(next_power_of_2(max(entries // 32_768, 1)), 8), 64)
        return Tile(rows, entries=min(128, 4096 // block_dim), warps=4, stages=3, programs=programs)
    return Tile(
        rows,
        entries=min(128, 8192 // block_dim),
        warps=8 if rows * block_dim > 4096 else 4,
        stages=3 if block_dim <= 128 else 2,
        programs=512 // rows,  # the more rows, the larger are the sums that a part writes
    )


def ragged_attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    batch, heads, q, head_dim = query.shape
    kv_heads, slots, value_dim = tail_value.shape[1:]
    groups = heads // kv_heads
    output = query.new_empty(batch, heads, q, value_dim)
    if interpreting() and query.dtype == torch.bfloat16:  # its dot takes bfloat16 for integers
        query, keys, values, tail_key, tail_value = (
            tensor.float() for tensor in (query, keys, values, tail_key, tail_value)
        )
    query, keys, values, tail_key, tail_value = map(_unit_stride, (query, keys, values, tail_key, tail_value))
    if tile is None:
        widest = max(head_dim, value_dim)
        tile = default_tile(groups * q, widest, query.element_size(), batch * kv_heads * longest)

    row_blocks = ceil_div(groups * q, tile.rows)
    blocks = batch * kv_heads * row_blocks
    wanted = tile.programs * multiprocessors(query.device)
    whole = q > 1 and 4 * blocks >= wanted
    chunk = max(1, ceil_div(ceil_div(longest, tile.entries) * blocks, wanted)) * tile.entries
    prefix_chunks, tail_chunks = (1, 0) if whole else (ceil_div(longest, chunk), ceil_div(slots, chunk))
    parts = prefix_chunks + tail_chunks
    # Each row's sums relative to its largest logit, that logit, and the sum of the exponentials.
    partial = query.new_empty((0,) if whole else (batch * heads * q, parts, value_dim), dtype=torch.float32)
    statistics = query.new_empty((0,) if whole else (batch * heads * q, parts, 2), dtype=torch.float32)

    mask = None if tail_mask is None else _unit_stride(tail_mask.expand(batch, 1, q, slots)).view(torch.uint8)
    launch = dependent_launch(query.device)
    with torch.cuda.device_of(query):
        _attend_kernel[(parts * row_blocks, kv_heads, batch)](
            query,
            keys,
            values,
            starts.contiguous(),
            lengths.contiguous(),
            tail_key,
            tail_value,
            mask,
            sinks,
            partial,
            statistics,
            output,
            q,
            slots,
            chunk,
            prefix_chunks,
            parts,
            row_blocks,
            *logit_scales(scaling, softcap),
            *query.stride()[:3],
            keys.stride(0),
            values.stride(0),
            *tail_key.stride()[:3],
            *tail_value.stride()[:3],
            *((0, 0) if mask is None else (mask.stride(0), mask.stride(2))),
            GROUPS=groups,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            HAS_SOFTCAP=softcap is not None,
            WHOLE=whole,
            BLOCK_ROWS=tile.rows,
            BLOCK_ENTRIES=tile.entries,
            BLOCK_HEAD_DIM=max(16, next_power_of_2(head_dim)),
            BLOCK_VALUE_DIM=max(16, next_power_of_2(value_dim)),
            STAGES=tile.stages,
            DEPENDENT=bool(launch),
            num_warps=tile.warps,
            **launch,
        )
        if not whole:
            block_value_dim = next_power_of_2(value_dim)
            _combine_kernel[(batch * heads * q,)](
                partial,
                statistics,
                lengths.contiguous(),
                sinks,
                output,
                q,
                chunk,
                parts,
                tail_chunks,
                HEADS=heads,
                GROUPS=groups,
                VALUE_DIM=value_dim,
                BLOCK_PARTS=min(next_power_of_2(parts), max(1, MOST_COMBINED // block_value_dim)),
                BLOCK_VALUE_DIM=block_value_dim,
                DEPENDENT=bool(launch),
                num_warps=4,
                **launch,
            )
    return output


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def _attend_tile(
    largest,
    total,
    sums,
    rows,
    seen,
    key,
    value,
    entry,
    stop,
    scale,
    softcap,
    key_stride,
    value_stride,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """Adds entries to a softmax: those before ``stop`` that ``seen`` lets a row see."""
    keys, values = load_keys_and_values(
        key, value, entry, stop, key_stride, value_stride, HEAD_DIM, VALUE_DIM, BLOCK_HEAD_DIM, BLOCK_VALUE_DIM
    )
    logits = base2_logits(tl.dot(rows, keys, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
    logits = tl.where(seen, logits, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(logits, 1))
    reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # a row may see nothing so far
    weights = tl.exp2(logits - reference[:, None])
    kept = tl.exp2(largest - reference)
    total = total * kept + tl.sum(weights, 1)
    sums = sums * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_largest, total, sums


@triton.jit(do_not_specialize=["q", "slots", "chunk", "prefix_chunks", "parts", "row_blocks"])
def _attend_kernel(
    query,
    keys,
    values,
    starts,
    lengths,
    tail_key,
    tail_value,
    tail_mask,
    sinks,
    partial,
    statistics,
    output,
    q,
    slots,
    chunk,
    prefix_chunks,
    parts,
    row_blocks,
    scale,
    softcap,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    keys_stride,
    values_stride,
    tail_key_stride_batch,
    tail_key_stride_head,
    tail_key_stride_slot,
    tail_value_stride_batch,
    tail_value_stride_head,
    tail_value_stride_slot,
    mask_stride_batch,
    mask_stride_token,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A block of queries of one KV head, over a chunk of its prefix or of its tail; over everything if ``WHOLE``."""
    part, row_block = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if DEPENDENT:
        gdc_wait()
    segment = batch * tl.num_programs(1) + kv_head
    length = tl.load(lengths + segment)
    if WHOLE:
        begin, end = 0, length
        tail_begin, tail_end = 0, slots
    else:
        begin, end = part * chunk, tl.minimum((part + 1) * chunk, length)
        tail_begin = tl.where(part < prefix_chunks, slots, (part - prefix_chunks) * chunk)
        tail_end = tl.minimum(tail_begin + chunk, slots)
        if (part < prefix_chunks) & (begin >= length):
            return

    # Queries of a token follow each other, so that the tokens of a block are neighbors.
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < GROUPS * q
    token = row // GROUPS
    head = kv_head * GROUPS + row % GROUPS
    feature = tl.arange(0, BLOCK_HEAD_DIM)
    value_feature = tl.arange(0, BLOCK_VALUE_DIM)
    rows = tl.load(
        query
        + batch * query_stride_batch
        + head[:, None] * query_stride_head
        + token[:, None].to(tl.int64) * query_stride_token
        + feature[None, :],
        mask=exists[:, None] & (feature < HEAD_DIM)[None, :],
        other=0.0,
    )
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_VALUE_DIM), tl.float32)

    start = tl.load(starts + segment)
    keys += start * keys_stride
    values += start * values_stride
    for first in tl.range(begin, end, BLOCK_ENTRIES, num_stages=STAGES):
        entry = first + tl.arange(0, BLOCK_ENTRIES)
        largest, total, sums = _attend_tile(
            largest,
            total,
            sums,
            rows,
            (entry < end)[None, :],
            keys,
            values,
            entry,
            end,
            scale,
            softcap,
            keys_stride,
            values_stride,
            HEAD_DIM,
            VALUE_DIM,
            HAS_SOFTCAP,
            BLOCK_HEAD_DIM,
            BLOCK_VALUE_DIM,
        )

    tail_key += batch * tail_key_stride_batch + kv_head * tail_key_stride_head
    tail_value += batch * tail_value_stride_batch + kv_head * tail_value_stride_head
    if tail_mask is None:
        last_token = tl.minimum(row_block * BLOCK_ROWS + BLOCK_ROWS - 1, GROUPS * q - 1) // GROUPS
        tail_end = tl.minimum(tail_end, slots - q + last_token + 1)
    for first in range(tail_begin, tail_end, BLOCK_ENTRIES):
        entry = first + tl.arange(0, BLOCK_ENTRIES)
        if tail_mask is None:
            seen = entry[None, :] <= slots - q + token[:, None]
        else:
            seen = (
                tl.load(
                    tail_mask
                    + batch * mask_stride_batch
                    + token[:, None].to(tl.int64) * mask_stride_token
                    + entry[None, :],
                    mask=exists[:, None] & (entry < slots)[None, :],
                    other=0,
                )
                != 0
            )
        # Room for tokens to come is not read.
        if tl.max(tl.max(seen.to(tl.int32), 1), 0) != 0:
            largest, total, sums = _attend_tile(
                largest,
                total,
                sums,
                rows,
                seen,
                tail_key,
                tail_value,
                entry,
                slots,
                scale,
                softcap,
                tail_key_stride_slot,
                tail_value_stride_slot,
                HEAD_DIM,
                VALUE_DIM,
                HAS_SOFTCAP,
                BLOCK_HEAD_DIM,
                BLOCK_VALUE_DIM,
            )

    if DEPENDENT:
        gdc_launch_dependents()
    place = (batch * tl.num_programs(1) * GROUPS + head) * q + token
    inside = exists[:, None] & (value_feature < VALUE_DIM)[None, :]
    if WHOLE:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * _LOG2_E
            new_largest = tl.maximum(largest, sink)
            kept = tl.exp2(largest - new_largest)
            total = total * kept + tl.exp2(sink - new_largest)
            sums = sums * kept[:, None]
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            output + place[:, None] * VALUE_DIM + value_feature[None, :], result.to(output.dtype.element_ty), inside
        )
    else:
        # Parts that exist follow each other.
        place = place * parts + tl.where(part < prefix_chunks, part, tl.cdiv(length, chunk) + part - prefix_chunks)
        # Sums of nothing are neither written nor read: room for tokens to come may be large.
        tl.store(partial + place[:, None] * VALUE_DIM + value_feature[None, :], sums, inside & (total != 0.0)[:, None])
        tl.store(statistics + 2 * place, largest, mask=exists)
        tl.store(statistics + 2 * place + 1, total, mask=exists)


@triton.jit(do_not_specialize=["q", "chunk", "parts", "tail_chunks"])
def _combine_kernel(
    partial,
    statistics,
    lengths,
    sinks,
    output,
    q,
    chunk,
    parts,
    tail_chunks,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The parts of one query, each relative to its own largest logit, put together."""
    row = tl.program_id(0).to(tl.int64)
    head = row // q % HEADS
    feature = tl.arange(0, BLOCK_VALUE_DIM)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(lengths + row // q // GROUPS)  # groups of heads of all rows follow each other
    existing = tl.cdiv(length, chunk) + tail_chunks
    # Not minus infinity where nothing is seen at all: every weight is then 0, not NaN.
    largest = tl.full((), -1e30, tl.float32)
    denominator = tl.zeros((), tl.float32)
    if sinks is not None:
        largest = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        denominator += 1.0
    result = tl.zeros((BLOCK_VALUE_DIM,), tl.float32)
    for first in range(0, existing, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        place = row * parts + part
        part_largest = tl.load(statistics + 2 * place, mask=part < existing, other=float("-inf"))
        part_total = tl.load(statistics + 2 * place + 1, mask=part < existing, other=0.0)
        sums = tl.load(
            partial + place[:, None] * VALUE_DIM + feature[None, :],
            mask=(part_total != 0.0)[:, None] & (feature < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(part_largest, 0))
        weight = tl.exp2(part_largest - new_largest)
        kept = tl.exp2(largest - new_largest)
        denominator = denominator * kept + tl.sum(weight * part_total, 0)
        result = result * kept + tl.sum(weight[:, None] * sums, 0)
        largest = new_largest
    result = result / tl.where(denominator == 0.0, 1.0, denominator)
    tl.store(output + row * VALUE_DIM + feature, result.to(output.dtype.element_ty), mask=feature < VALUE_DIM)
