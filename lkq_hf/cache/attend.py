"""Attention over a prefix and a tail, whatever attention implementation the model has."""

from dataclasses import replace
from typing import Any

import torch

from lkq_hf.attention import AttentionCall
from lkq_hf.cache.prefix import Prefix
from lkq_hf.kernels.decode_attention import decode_attention
from lkq_hf.kernels.ragged_attention import ragged_attention

# Arguments of attention functions that ask for more than a softmax over dot products.
_OTHER_ARITHMETIC = ("softcap", "position_bias", "s_aux", "cache")


def attend_over(
    call: AttentionCall, prefix: Prefix | None, text_mask: torch.Tensor | None, holds_prefix: bool = False
) -> Any:
    """What the model's attention returns when its keys and values follow those of ``prefix``.

    Every query sees its row's and head's whole prefix, and of the tail what the model's mask lets it see.

    Args:
        call: of the model's attention, over the tail.
        prefix: what was kept of the text before the tail; None if there is nothing.
        text_mask: ``[batch, text]`` over the whole text, True for real tokens, for implementations whose own masks do
            not say it; None if all are real.
        holds_prefix: whether the call's keys and values begin with those of ``prefix``, padded to the longest.
    """
    if prefix is None:
        return _attend_over_slots(call) if _is_one_token_over_slots(call) else _aligned(call).run()
    if holds_prefix:
        return _attend_dense(call, prefix, text_mask)
    if call.implementation in ("eager", "sdpa") and not _can_be_ragged(call):
        return _attend_padded(call, prefix)
    options = call.options if "flash" in call.implementation else {}
    output = ragged_attention(
        call.query,
        prefix.pool.keys,
        prefix.pool.values,
        prefix.starts,
        prefix.lengths,
        prefix.longest,
        call.key,
        call.value,
        _tail_mask(call, call.key.shape[2], prefix.source_length, text_mask),
        call.scaling,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    return output.transpose(1, 2), None


def _aligned(call: AttentionCall) -> AttentionCall:
    """The call with a mask, where a decoder dropped all but its last queries and left the mask to sdpa.

    Decoders do so (Gemma 4, in layers that share keys and values) unless their attention is named "sdpa", for torch
    takes the queries of a causal attention for the first ones.
    """
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.implementation != "sdpa" or call.mask is not None or not 1 < queries < keys:
        return call
    return replace(call, mask=_causal(queries, keys, call.query.device))


def _plain(call: AttentionCall) -> bool:
    """Whether this is a softmax over dot products and no more, outside of training."""
    return call.implementation == "sdpa" and not call.options.get("dropout") and not torch.is_grad_enabled()


def _can_be_ragged(call: AttentionCall) -> bool:
    # transformers' "sdpa" ignores a softcap, so what equals it does as well.
    return _plain(call) and all(call.options.get(name) is None for name in _OTHER_ARITHMETIC[1:])


def _is_one_token_over_slots(call: AttentionCall) -> bool:
    mask = call.mask
    return (
        call.query.shape[2] == 1
        and isinstance(mask, torch.Tensor)
        and mask.dtype == torch.bool
        and mask.shape[1:] == (1, 1, call.key.shape[2])
        and _plain(call)
        and all(call.options.get(name) is None for name in _OTHER_ARITHMETIC)
    )


def _attend_over_slots(call: AttentionCall) -> Any:
    """Where a mask is needed for slots that nothing was written to yet, sdpa copies keys for every head of a group."""
    return decode_attention(call.query, call.key, call.value, call.mask, call.scaling).transpose(1, 2), None


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """``[1, 1, queries, keys]``: the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def _tail_mask(call: AttentionCall, tail: int, first: int, text_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Bool ``[batch or 1, 1, queries, tail]``; None if it is causal without padding.

    Args:
        call: of the model's attention.
        tail: entries that the model's mask is about.
        first: place of the first of them in the text.
        text_mask: as for `attend_over`.
    """
    mask = call.mask
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return mask if mask.dtype == torch.bool else mask == 0
    if call.implementation == "sdpa" or text_mask is None:
        return None
    seen = text_mask[:, None, None, first : first + tail].bool().to(call.query.device)
    return seen & _causal(call.query.shape[2], tail, call.query.device)


def _attend_padded(call: AttentionCall, prefix: Prefix) -> Any:
    """The model's own attention over all entries as one dense tensor, with a mask for every head."""
    keys, values, _, valid = prefix.padded()
    return replace(
        call,
        key=torch.cat([keys, call.key], dim=2),
        value=torch.cat([values, call.value], dim=2),
        mask=_mask_over_both(call, valid, call.key.shape[2]),
    ).run()


def _attend_dense(call: AttentionCall, prefix: Prefix, text_mask: torch.Tensor | None) -> Any:
    """The model's own attention over keys and values that begin with those of the prefix."""
    column = torch.arange(prefix.longest, device=prefix.starts.device)
    valid = column < prefix.lengths[..., None]
    tail = call.key.shape[2] - prefix.longest
    if "flash" in call.implementation:
        # Their masks say of each entry whether it is real; what is causal they know.
        mask = call.mask if isinstance(call.mask, torch.Tensor) else valid.new_ones(valid.shape[0], tail)
        return replace(call, mask=torch.cat([valid[:, 0], mask.bool()], dim=-1)).run()
    if call.implementation not in ("eager", "sdpa"):
        call = replace(call, implementation="sdpa", mask=_tail_mask(call, tail, prefix.source_length, text_mask))
    return replace(call, mask=_mask_over_both(call, valid, tail)).run()


def _mask_over_both(call: AttentionCall, valid: torch.Tensor, tail: int) -> torch.Tensor:
    """What the model's mask says of the tail, behind what is ``valid [batch, kv_heads, longest]`` of a prefix."""
    batch, heads, queries, _ = call.query.shape
    seen = valid.repeat_interleave(heads // valid.shape[1], dim=1)[:, :, None].expand(-1, -1, queries, -1)
    mask = call.mask if isinstance(call.mask, torch.Tensor) else _causal(queries, tail, call.query.device)
    if call.implementation == "eager" and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(call.query.dtype).min).to(call.query.dtype)
    if mask.dtype != torch.bool:
        seen = torch.where(seen, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    return torch.cat([seen, mask[..., :tail].expand(batch, heads, -1, -1)], dim=-1)
