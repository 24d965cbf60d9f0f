"""Attention over segments of different lengths, one for each row and KV head, followed by a tail common to all."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import use_triton
from lkq_hf.kernels.launch import operator

VARLEN_TOKENS = 256
"""From here on, copying prefix and tail end to end costs little beside the arithmetic."""


@operator("lkq_hf::ragged_attention")
def ragged_attention(
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
) -> Tensor:
    """Each head's softmax(scaling * query key^T) value, over its prefix segment and its part of the tail.

    The prefix of (row, KV head) is ``keys[start : start + length]`` of a pool that all layers, rows and heads share.
    Every query sees its whole prefix. Segments may overlap. What is hidden or beyond a segment must be finite, too. An
    operator of torch: compilers do not look inside. Not differentiable.

    What runs, by the first line that applies:

    - a GPU that Triton serves, at least :data:`VARLEN_TOKENS` queries in half precision, no mask, softcap or sinks:
      torch's `varlen_attn`, over copies of prefix and tail;
    - a GPU that Triton serves: a kernel that reads prefix and tail where they lie;
    - a CPU: products of one segment after the other, which copy no keys and values, except to convert float16 and
      bfloat16 to float32;
    - otherwise: the definition, :func:`ragged_attention_reference`.

    Only a CPU needs the lengths on the host: nothing else waits for the device.

    Args:
        query: ``[batch, heads, q, head_dim]``.
        keys: ``[capacity, head_dim]``, the pool.
        values: ``[capacity, value_dim]``.
        starts: int64 ``[batch, kv_heads]``; ``kv_heads`` divides ``heads``.
        lengths: int32 ``[batch, kv_heads]``.
        longest: an upper bound of ``lengths``, for launches.
        tail_key: ``[batch, kv_heads, slots, head_dim]``.
        tail_value: ``[batch, kv_heads, slots, value_dim]``.
        tail_mask: bool ``[batch or 1, 1, q, slots]``, True for what is seen. None: the tail ends with the ``q`` tokens
            of the queries, and each sees the tail up to itself.
        scaling: of the dot products.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sinks: ``[heads]``, one more logit in each denominator (gpt-oss).

    Returns:
        ``[batch, heads, q, value_dim]`` in the dtype of ``query``; zeros for a token that sees nothing.

    Raises:
        ValueError: ``tail_mask`` is None, but the tail is shorter than the queries.
    """
    if tail_mask is None and tail_key.shape[2] < query.shape[2]:
        raise ValueError(
            f"without a tail_mask, the tail must hold the {query.shape[2]} tokens of the queries, found "
            f"{tail_key.shape[2]}. Append their keys and values to it first."
        )
    if use_triton(query, keys, values, tail_key, tail_value):
        if query.shape[2] >= VARLEN_TOKENS:
            from lkq_hf.kernels.ragged_attention_varlen import ragged_attention_varlen, varlen_serves

            if varlen_serves(query, values, tail_mask, softcap, sinks):
                return ragged_attention_varlen(
                    query, keys, values, starts, lengths, longest, tail_key, tail_value, scaling
                )
        from lkq_hf.kernels.ragged_attention_triton import ragged_attention_triton

        return ragged_attention_triton(
            query, keys, values, starts, lengths, longest, tail_key, tail_value, tail_mask, scaling, softcap, sinks
        )
    if query.device.type == "cpu":
        return _by_segment(
            query, keys, values, starts, lengths, tail_key, tail_value, tail_mask, scaling, softcap, sinks
        )
    return ragged_attention_reference(
        query, keys, values, starts, lengths, longest, tail_key, tail_value, tail_mask, scaling, softcap, sinks
    )


@torch.library.register_fake("lkq_hf::ragged_attention")
def _(query: Tensor, keys: Tensor, values: Tensor, *others: object, **options: object) -> Tensor:
    return query.new_empty(*query.shape[:-1], values.shape[-1])


def ragged_attention_reference(
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
) -> Tensor:
    """The definition of :func:`ragged_attention`: segments padded to the longest, and a mask for each KV head."""
    batch, heads, q, _ = query.shape
    kv_heads, slots = tail_key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    place = torch.arange(min(longest, keys.shape[0]), device=keys.device)
    inside = place < lengths[..., None]
    index = torch.where(inside, starts[..., None] + place, 0)
    key = torch.cat([keys[index], tail_key], 2).to(dtype)
    value = torch.cat([values[index], tail_value], 2).to(dtype)
    if tail_mask is None:
        tail_mask = causal(q, slots, query.device)
    seen = torch.cat(
        [
            inside[:, :, None, None].expand(-1, -1, 1, q, -1),
            tail_mask[:, :, None].expand(batch, kv_heads, 1, q, slots),
        ],
        -1,
    )

    grouped = query.reshape(batch, kv_heads, heads // kv_heads, q, -1).to(dtype)
    logits = scaling * grouped @ key[:, :, None].transpose(-1, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -torch.inf)
    if sinks is None:
        sink = logits.new_full((batch, kv_heads, heads // kv_heads, q, 1), -torch.inf)
    else:
        sink = sinks.to(dtype).view(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, q, -1)
    weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1].masked_fill(~seen, 0.0)
    return (weights @ value[:, :, None]).reshape(batch, heads, q, -1).to(query.dtype)


def causal(q: int, slots: int, device: torch.device) -> Tensor:
    """The mask of ``q`` tokens that are the last ones of ``slots``, ``[1, 1, q, slots]``."""
    return torch.ones(q, slots, dtype=torch.bool, device=device).tril(slots - q)[None, None]


def _by_segment(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """For CPUs: the segments are read where they lie, one product after the other, and share one softmax.

    Logits are ``[batch * kv_heads, rows, tail | prefix | sink]``, where the rows are the queries of a KV head's group.
    """
    batch, heads, q, _ = query.shape
    kv_heads, slots = tail_key.shape[1:3]
    groups = heads // kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = (query.to(dtype) * scaling).reshape(batch * kv_heads, groups * q, -1)
    segments = list(zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True))

    sink = slots + max(length for _, length in segments)
    logits = rows.new_full((len(rows), groups * q, sink + (sinks is not None)), -torch.inf)
    tail = _capped(torch.bmm(rows, tail_key.flatten(0, 1).to(dtype).mT), softcap)
    if tail_mask is None and q > 1:
        tail_mask = causal(q, slots, query.device)
    if tail_mask is not None:
        tail.view(batch, kv_heads, groups, q, slots).masked_fill_(~tail_mask[:, :, None], -torch.inf)
    logits[..., :slots] = tail
    for row, row_logits, (start, length) in zip(rows.unbind(), logits.unbind(), segments, strict=True):
        place = row_logits.narrow(1, slots, length)
        _capped(torch.mm(row, keys[start : start + length].to(dtype).t(), out=place), softcap)
    if sinks is not None:
        logits.view(batch, kv_heads, groups, q, -1)[..., -1] = sinks.view(kv_heads, groups, 1)

    weights = logits.softmax(-1)
    if tail_mask is not None or slots == 0:
        weights.masked_fill_(logits.amax(-1, keepdim=True) == -torch.inf, 0.0)  # not NaN where nothing is seen
    output = torch.bmm(weights[..., :slots], tail_value.flatten(0, 1).to(dtype))
    for row, row_weights, (start, length) in zip(output.unbind(), weights.unbind(), segments, strict=True):
        row.addmm_(row_weights.narrow(1, slots, length), values[start : start + length].to(dtype))
    return output.view(batch, heads, q, -1).to(query.dtype)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
