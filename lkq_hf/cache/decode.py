"""The decode of a cache with static shapes: its attention, and the mask of its next token.

Slots that nothing was written to yet have to be hidden by a mask, and with a mask transformers' "sdpa" copies keys and
values for every head of a group, each token anew. While ``generate`` fills such a cache, attention of one new token
reads what is stored (`attend_over`), inside the compiled graph as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from lkq_hf.attention import attending, implementation_of
from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.reading import Decoding
from lkq_hf.cache.static import StaticEvictedLayer, StaticSlidingLayer, StaticStorage

# The layers of a cache by the names that configs give to attention.
_KINDS = {"full_attention": StaticEvictedLayer, "sliding_attention": StaticSlidingLayer}

# Arguments of create_masks_for_generate that add to causality and padding.
_OTHER_MASKS = ("or_mask_function", "and_mask_function", "block_sequence_ids")


@contextmanager
def decoding(decoder: PreTrainedModel, cache: EvictedCache) -> Iterator[None]:
    """Inside, ``decoder`` attends over the prefix and the slots of ``cache``, compiled or not."""
    with attending(decoder, Decoding(decoder, cache, None).attend, compiles=True):
        yield


def next_token_mask(
    cache: EvictedCache, /, config: Any, inputs_embeds: torch.Tensor, attention_mask: Any, **others: Any
) -> torch.Tensor | dict[str, torch.Tensor] | None:
    """What transformers' ``create_masks_for_generate`` makes of the same arguments, in a tenth of the time.

    Returns:
        A mask ``[batch, 1, 1, slots]``, or, as the config's ``layer_types`` demand, a dict of it; None where there is
        more to do: several tokens, sliding windows, further masks, another attention.
    """
    text_config = config.get_text_config()
    if (
        inputs_embeds.shape[1] != 1
        or implementation_of(text_config) != "sdpa"
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


def masks_are_known(layers: list[Any], config: Any) -> bool:
    """Whether `masks_on_device` makes the masks that a model with this config needs for a token.

    Args:
        layers: of a cache.
        config: of the model.
    """
    text_config = config.get_text_config()
    layer_types = getattr(text_config, "layer_types", None) or ["full_attention"]
    windows = {layer.sliding_window for layer in layers if isinstance(layer, StaticSlidingLayer)}
    kinds = {type(layer) for layer in layers}
    return (
        implementation_of(text_config) == "sdpa"
        and len(windows) <= 1
        and kinds <= set(_KINDS.values())
        and {_KINDS.get(name) for name in layer_types} == kinds
    )


def masks_on_device(cache: EvictedCache, config: Any, real: torch.Tensor | None) -> Any:
    """Masks for the next token from numbers that are on the device, so that a graph makes new ones at each replay.

    Args:
        cache: of which `masks_are_known`.
        config: of the model.
        real: ``[batch, prompt + 1]`` bool, False for padding of the text so far, and a last column of True for the
            tokens to come; None if there is no padding.

    Returns:
        As `next_token_mask`.
    """
    layer_types = getattr(config.get_text_config(), "layer_types", None)
    masks = {}
    for name, kind in _KINDS.items():
        layer = next((layer for layer in cache.layers if type(layer) is kind), None)
        if layer is not None:
            masks[name] = _mask_on_device(layer, cache.batch, real)
    return masks if layer_types is not None else masks["full_attention"]


def _mask_on_device(layer: StaticStorage, batch: int, real: torch.Tensor | None) -> torch.Tensor:
    slots = torch.arange(layer.keys.shape[2], device=layer.keys.device)
    seen = slots <= layer.filled  # the new token goes into the next slot
    if isinstance(layer, StaticSlidingLayer):
        seen &= slots > layer.filled - layer.sliding_window
    if real is None:
        return seen.expand(batch, 1, 1, -1).contiguous()
    columns = (slots + layer.offset).clamp(max=real.shape[1] - 1)
    return (real.index_select(1, columns) & seen)[:, None, None]
