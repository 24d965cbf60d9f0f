"""The decode of a cache with static shapes: its attention, and the mask of its next token.

Slots that nothing was written to yet have to be hidden by a mask, and with a mask transformers' "sdpa" copies keys and
values for every head of a group, each token anew. While ``generate`` fills such a cache, the model's attention is
"sdpa" but for one new token, whose heads read what is stored. It is registered by transformers' own interface and
named by the model's config, so that other models never meet it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lkq_hf.attention import DECODE_ATTENTION, attention_registry
from lkq_hf.cache.cache import LookaheadCache
from lkq_hf.cache.static import StaticEvictedLayer
from lkq_hf.kernels.decode_attention import decode_attention

# Arguments of attention functions that ask for more than a softmax over dot products.
_OTHER_ARITHMETIC = ("softcap", "position_bias", "s_aux", "cache")


def decode_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", with :func:`~lkq_hf.kernels.decode_attention.decode_attention` for one token at a time."""
    if (
        query.shape[2] == 1
        and attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape[1:] == (1, 1, key.shape[2])
        and dropout == 0.0
        and not torch.is_grad_enabled()
        and all(kwargs.get(name) is None for name in _OTHER_ARITHMETIC)
    ):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return decode_attention(query, key, value, attention_mask, scaling).transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


AttentionInterface.register(DECODE_ATTENTION, decode_attention_forward)
AttentionMaskInterface.register(DECODE_ATTENTION, sdpa_mask)

# Arguments of create_masks_for_generate that add to causality and padding.
_OTHER_MASKS = ("or_mask_function", "and_mask_function", "block_sequence_ids")

_lock = threading.Lock()
_decoding: dict[int, int] = {}  # id of a config -> number of decodes under way, over all threads


@contextmanager
def decoding(decoder: PreTrainedModel) -> Iterator[None]:
    """Inside, ``decoder`` attends by :func:`decode_attention_forward`, if it attends by "sdpa" otherwise."""
    config = decoder.config
    with _lock:
        running = _decoding.get(id(config), 0)
        applies = running > 0 or (
            config._attn_implementation == "sdpa" and attention_registry(decoder) is ALL_ATTENTION_FUNCTIONS
        )
        if applies:
            config._attn_implementation = DECODE_ATTENTION
            _decoding[id(config)] = running + 1
    try:
        yield
    finally:
        if applies:
            with _lock:
                _decoding[id(config)] -= 1
                if not _decoding[id(config)]:
                    del _decoding[id(config)]
                    config._attn_implementation = "sdpa"


def next_token_mask(
    cache: LookaheadCache, /, config: Any, inputs_embeds: torch.Tensor, attention_mask: Any, **others: Any
) -> torch.Tensor | dict[str, torch.Tensor] | None:
    """What transformers' ``create_masks_for_generate`` makes of the same arguments, in a tenth of the time.

    Returns:
        A mask ``[batch, 1, 1, slots]``, or, as the config's ``layer_types`` demand, a dict of it; None where there is
        more to do: several tokens, sliding windows, further masks, another attention.
    """
    text_config = config.get_text_config()
    if (
        inputs_embeds.shape[1] != 1
        or text_config._attn_implementation != DECODE_ATTENTION
        or not isinstance(attention_mask, torch.Tensor)
        or attention_mask.ndim != 2
        or not all(type(layer) is StaticEvictedLayer for layer in cache.layers)
        or any(others.get(name) is not None for name in _OTHER_MASKS)
    ):
        return None
    slots, offset = cache.get_mask_sizes(1, 0)
    # One column for each token of the text up to the new one, as slots are filled: those behind are not seen.
    # New memory each time, also where all are filled: another layout would compile again.
    seen = attention_mask[:, offset:]
    mask = torch.zeros(seen.shape[0], slots, dtype=torch.bool, device=seen.device)
    mask[:, : seen.shape[1]] = seen
    mask = mask[:, None, None]
    layer_types = getattr(text_config, "layer_types", None)
    return mask if layer_types is None else dict.fromkeys(layer_types, mask)
