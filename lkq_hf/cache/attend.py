"""Attention over a prefix and a tail, whatever attention implementation the model has."""

from dataclasses import replace
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from lkq_hf.attention import AttentionCall
from lkq_hf.cache.prefix import Prefix
from lkq_hf.kernels.decode_attention import decode_attention
from lkq_hf.kernels.dispatch import use_triton
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
    softcap, sinks = _softcap_and_sinks(call)
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
        softcap,
        sinks,
    )
    return output.transpose(1, 2), None


def attend_to_text(
    call: AttentionCall, before: int, text_mask: torch.Tensor | None, padding: torch.Tensor | None
) -> Any:
    """What the model's attention returns when its keys and values are those of the whole text.

    By sdpa with a mask, as on a CPU, a mask of all queries and keys and keys repeated for every head would take more
    memory than all else. On a GPU flash attention needs neither where nothing is padded, and elsewhere our kernel.

    Args:
        call: of the model's attention. Its mask is about what follows the first ``before`` entries alone.
        before: entries that every query sees, but for padding.
        text_mask: ``[batch, <= text]``, True for real tokens, as are those behind it; None if all are.
        padding: of each row, on its left, ``[batch]``; None if there is none, or some elsewhere.
    """
    keys, device = call.key.shape[2], call.query.device
    if text_mask is not None:
        text_mask = F.pad(text_mask.to(device), (0, keys - text_mask.shape[1]), value=True)
    if "flash" in call.implementation:  # their masks say of each entry whether it is real; what is causal they know
        return replace(call, mask=text_mask).run()
    mask = _tail_mask(call, keys - before, before, text_mask)
    if call.implementation != "flex_attention" and not (_can_be_ragged(call) and use_triton(call.query, call.key)):
        valid = torch.ones(1, keys, dtype=torch.bool, device=device) if text_mask is None else text_mask
        return replace(call, mask=_mask_over_both(call, valid[:, None, :before], keys - before)).run()
    if text_mask is None and mask is None and _flash_serves(call):
        output = F.scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            causal_lower_right(call.query.shape[2], keys),
            scale=call.scaling,
            enable_gqa=True,
        )
        return output.transpose(1, 2), None
    if text_mask is not None and padding is None:
        mask, before = _mask_over_both(replace(call, mask=mask), text_mask[:, None, :before], keys - before), 0
    return _attend_behind_padding(call, before, padding, mask)


def _flash_serves(call: AttentionCall) -> bool:
    """Whether torch's flash attention computes what this call asks for."""
    if any(each is not None for each in _softcap_and_sinks(call)):
        return False
    return can_use_flash_attention(SDPAParams(call.query, call.key, call.value, None, 0.0, False, True))


def _attend_behind_padding(
    call: AttentionCall, before: int, padding: torch.Tensor | None, mask: torch.Tensor | None
) -> Any:
    """Ragged attention: the first ``before`` entries of each row and head are a segment without its padding."""
    batch, kv_heads, keys, _ = call.key.shape
    starts = torch.arange(batch * kv_heads, device=call.key.device).view(batch, kv_heads) * keys
    skipped = starts.new_zeros(batch, 1) if padding is None else padding.to(starts).clamp(max=before)[:, None]
    softcap, sinks = _softcap_and_sinks(call)
    output = ragged_attention(
        call.query,
        call.key.flatten(0, 2),
        call.value.flatten(0, 2),
        starts + skipped,
        (before - skipped).int().expand(-1, kv_heads),
        before,
        call.key[:, :, before:],
        call.value[:, :, before:],
        mask,
        call.scaling,
        softcap,
        sinks,
    )
    return output.transpose(1, 2), None


def _softcap_and_sinks(call: AttentionCall) -> tuple[float | None, torch.Tensor | None]:
    # transformers' "sdpa" ignores a softcap, so what equals it does as well.
    return (None, None) if call.implementation == "sdpa" else (call.options.get("softcap"), call.options.get("s_aux"))


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
    seen = F.pad(seen, (0, tail - seen.shape[-1]), value=True)  # appended tokens
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
    """What the model's mask says of the tail, behind what is valid of a prefix.

    Args:
        call: of the model's attention.
        valid: ``[1 or batch, 1 or kv_heads, longest]``, of the prefix.
        tail: entries that the model's mask is about.

    Returns:
        ``[1 or batch, 1 or heads, queries, longest + tail]``.
    """
    queries = call.query.shape[2]
    if valid.shape[1] > 1:
        valid = valid.repeat_interleave(call.query.shape[1] // valid.shape[1], dim=1)
    mask = call.mask if isinstance(call.mask, torch.Tensor) else _causal(queries, tail, call.query.device)
    if call.implementation == "eager" and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(call.query.dtype).min).to(call.query.dtype)
    if mask.dtype != torch.bool:
        valid = torch.where(valid, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    batch = max(len(valid), len(mask))
    parts = valid[:, :, None], mask[..., :tail]
    return torch.cat([part.expand(batch, valid.shape[1], queries, -1) for part in parts], dim=-1)
