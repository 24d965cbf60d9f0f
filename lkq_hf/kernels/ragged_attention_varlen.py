"""Many queries of :mod:`lkq_hf.kernels.ragged_attention`, by torch's attention over sequences of any lengths."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8


def varlen_serves(
    query: Tensor, values: Tensor, tail_mask: Tensor | None, softcap: float | None, sinks: Tensor | None
) -> bool:
    """Whether `varlen_attn` computes what is asked: half precision and plain causal attention, on NVIDIA GPUs."""
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and tail_mask is None
        and softcap is None
        and sinks is None
        and values.shape[-1] == head_dim
        and head_dim <= _LARGEST_HEAD
        and head_dim % _HEAD_MULTIPLE == 0
    )


def ragged_attention_varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    tail_key: Tensor,
    tail_value: Tensor,
    scaling: float,
) -> Tensor:
    """Each (row, KV head) is a sequence: its prefix and tail, copied end to end, and the query heads of its group."""
    batch, heads, q, head_dim = query.shape
    kv_heads, slots = tail_key.shape[1:3]
    segments = batch * kv_heads
    ends = (lengths.flatten() + slots).cumsum(0, dtype=torch.int32)
    key_offsets = torch.nn.functional.pad(ends, (1, 0))
    first = key_offsets[:-1].view(batch, kv_heads, 1)

    place = torch.arange(min(longest, keys.shape[0]), device=query.device)
    inside = place < lengths[..., None]
    # The host does not know how long the whole is. Places behind a prefix all go to one row that nothing reads.
    capacity = segments * (len(place) + slots)
    source = torch.where(inside, starts[..., None] + place, 0)
    target = torch.where(inside, first + place, capacity)
    tail_target = (first + lengths[..., None] + torch.arange(slots, device=query.device)).long()

    def joined(pool: Tensor, tail: Tensor) -> Tensor:
        rows = pool.new_empty(capacity + 1, pool.shape[-1])
        rows[target] = pool[source]
        rows[tail_target] = tail
        return rows[:, None]

    output: Any = varlen_attn(
        query.view(batch, kv_heads, -1, q, head_dim).transpose(2, 3).reshape(segments * q, -1, head_dim),
        joined(keys, tail_key),
        joined(values, tail_value),
        torch.arange(0, segments * q + 1, q, dtype=torch.int32, device=query.device),
        key_offsets,
        q,
        len(place) + slots,
        scale=scaling,
        window_size=(-1, 0),  # causal, and the last query sees everything
        **_grouped_heads(),
    )
    grouped: Tensor = output.view(batch, kv_heads, q, -1, head_dim)
    return grouped.transpose(2, 3).reshape(batch, heads, q, head_dim)


@functools.cache
def _grouped_heads() -> dict[str, Any]:
    """The option that allows fewer KV heads than query heads; torch 2.11 has none and allows it anyway."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
