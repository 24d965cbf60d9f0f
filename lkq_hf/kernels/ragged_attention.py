"""Attention over segments of different lengths, one for each row and KV head, followed by a tail common to all."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lkq_hf.kernels.dispatch import use_triton
from lkq_hf.kernels.launch import operator

SDPA_TOKENS = 16
"""From here on, a CPU gains more by torch's attention than it loses by appending the tail to each segment."""


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
    Every query sees its whole prefix. Segments may overlap. What is hidden or beyond a segment must be finite, too.
    Compilers do not look inside. Not differentiable.

    What runs, by the first line that applies:

    - a GPU that Triton serves: a kernel that reads prefix and tail where they lie. (For 4 to 1,024 queries on an H200,
      it takes 0.02 to 0.5 times as long as torch's `varlen_attn`, which needs copies.)
    - a CPU, at least `SDPA_TOKENS` queries, no softcap or sinks: torch's `scaled_dot_product_attention` for each
      segment, over copies of prefix and tail;
    - a CPU: products for each segment, which copy no keys and values, except to convert float16 and bfloat16 to
      float32;
    - otherwise: the definition, `ragged_attention_reference`.

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
    # Under a compiler an operator of torch; without, the call of one costs the host more than it is worth.
    attend = _operator if torch.compiler.is_compiling() else _attend
    return attend(
        query, keys, values, starts, lengths, longest, tail_key, tail_value, tail_mask, scaling, softcap, sinks
    )


def _attend(
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
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if tail_mask is None and tail_key.shape[2] < query.shape[2]:
        raise ValueError(
            f"without a tail_mask, the tail must hold the {query.shape[2]} tokens of the queries, found "
            f"{tail_key.shape[2]}. Append their keys and values to it first."
        )
    if use_triton(query, keys):
        from lkq_hf.kernels.ragged_attention_triton import ragged_attention_triton

        return ragged_attention_triton(
            query, keys, values, starts, lengths, longest, tail_key, tail_value, tail_mask, scaling, softcap, sinks
        )
    if query.device.type == "cpu":
        if query.shape[2] >= SDPA_TOKENS and softcap is None and sinks is None:
            return _by_segment_sdpa(query, keys, values, starts, lengths, tail_key, tail_value, tail_mask, scaling)
        return _by_segment(
            query, keys, values, starts, lengths, tail_key, tail_value, tail_mask, scaling, softcap, sinks
        )
    return ragged_attention_reference(
        query, keys, values, starts, lengths, longest, tail_key, tail_value, tail_mask, scaling, softcap, sinks
    )


_operator = operator("lkq_hf::ragged_attention")(_attend)


@torch.library.register_fake("lkq_hf::ragged_attention")
def _(query: Tensor, keys: Tensor, values: Tensor, *others: object) -> Tensor:
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
    """The definition of `ragged_attention`: segments padded to the longest, and a mask for each KV head."""
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


def _by_segment_sdpa(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """For CPUs and many queries: torch's attention for each segment, to which its tail is appended."""
    batch, heads, q, _ = query.shape
    kv_heads, slots = tail_key.shape[1:3]
    groups = heads // kv_heads
    if tail_mask is None:
        tail_mask = causal(q, slots, query.device)
    tail_mask = tail_mask.expand(batch, 1, q, slots)
    output = query.new_empty(batch, heads, q, values.shape[-1])
    for i, (start, length) in enumerate(zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True)):
        row, kv_head = divmod(i, kv_heads)
        group = slice(kv_head * groups, (kv_head + 1) * groups)
        key = torch.cat([keys[start : start + length], tail_key[row, kv_head]])
        value = torch.cat([values[start : start + length], tail_value[row, kv_head]])
        output[row, group] = scaled_dot_product_attention(
            query[None, row, group],
            key.expand(1, groups, *key.shape),
            value.expand(1, groups, *value.shape),
            torch.nn.functional.pad(tail_mask[None, row], (length, 0), value=True),
            scale=scaling,
        )[0]
    return output


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
    segments = list(zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True))
    columns = slots + max([length for _, length in segments]) + (sinks is not None)

    def wide(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == dtype else tensor.to(dtype)  # to do nothing takes `to` a while

    rows = wide(query).reshape(batch * kv_heads, groups * q, -1) * scaling
    logits = rows.new_full((batch * kv_heads, groups * q, columns), -torch.inf)
    torch.bmm(rows, wide(tail_key).flatten(0, 1).mT, out=logits[:, :, :slots])
    for i, (start, length) in enumerate(segments):
        key = wide(keys[start : start + length])
        torch.mm(rows[i], key.t(), out=logits[i, :, slots : slots + length])
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
        for i, (_, length) in enumerate(segments):
            logits[i, :, slots + length :] = -torch.inf
    grouped = logits.view(batch, kv_heads, groups, q, columns)
    if sinks is not None:
        grouped[..., -1] = sinks.view(kv_heads, groups, 1)
    if tail_mask is None and q > 1:
        tail_mask = causal(q, slots, query.device)
    if tail_mask is not None:
        grouped[..., :slots].masked_fill_(~tail_mask[:, :, None], -torch.inf)

    weights = logits.softmax(-1)
    if tail_mask is not None:
        weights.masked_fill_(logits.amax(-1, keepdim=True) == -torch.inf, 0.0)  # not NaN where nothing is seen
    output = torch.bmm(weights[:, :, :slots], wide(tail_value).flatten(0, 1))
    for i, (start, length) in enumerate(segments):
        output[i].addmm_(weights[i, :, slots : slots + length], wide(values[start : start + length]))
    output = output.view(batch, heads, q, -1)
    return output if query.dtype == dtype else output.to(query.dtype)
