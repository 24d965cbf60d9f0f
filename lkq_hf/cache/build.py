"""The layers that a model needs in a LookaheadCache."""

from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from lkq_hf.cache.latent import LatentLayer, StaticLatentLayer
from lkq_hf.cache.layers import EvictedLayer, UncompressedSlidingLayer
from lkq_hf.cache.recurrent import (
    MixedLayer,
    MixedSlidingLayer,
    RecurrentLayer,
    StaticMixedLayer,
    StaticMixedSlidingLayer,
)
from lkq_hf.cache.static import StaticEvictedLayer, StaticSlidingLayer

INSTEAD = "Generate without past_key_values, or with DynamicCache, for this model."

# Layers of transformers that cannot be cut to a set of entries, by the names of their classes: not every version has
# all of them.
_REASONS = {
    "DynamicIndexedLayer": "an indexer selects the few entries that each token attends to, by keys of its own",
    "DeepseekV4HCACache": "its entries each stand for many tokens: the model compresses its cache itself",
    "DeepseekV4CSACache": "its entries each stand for several tokens: the model compresses its cache itself",
}


def build_layers(config: PreTrainedConfig, parks: bool, room: int | None) -> list[Any]:
    """Empty layers for a model.

    Args:
        config: of the decoder.
        parks: whether evicted entries stay in main memory.
        room: for static shapes, tokens to lay out room for beyond what a prompt leaves; None for growing ones.

    Raises:
        NotImplementedError: the model has layers whose entries cannot be evicted, or none with entries to evict.
    """
    layers = [
        _layer(layer, index, config, parks, room) for index, layer in enumerate(DynamicCache(config=config).layers)
    ]
    if any(isinstance(layer, EvictedLayer) for layer in layers):
        return layers
    if any(isinstance(layer, UncompressedSlidingLayer) for layer in layers):
        raise NotImplementedError(
            f"every attention layer of this model ({config.model_type}) has a sliding window, which bounds its cache "
            f"already: there is nothing to evict. {INSTEAD}"
        )
    raise NotImplementedError(
        f"every layer of this model ({config.model_type}) keeps a state of fixed size: there is nothing to evict. "
        f"{INSTEAD}"
    )


def _layer(layer: Any, index: int, config: PreTrainedConfig, parks: bool, room: int | None) -> Any:
    # Exact types: subclasses carry more state, which eviction would leave inconsistent.
    kind = type(layer)
    if kind is DynamicLayer and getattr(config, "kv_lora_rank", None) is not None:
        return LatentLayer(parks) if room is None else StaticLatentLayer(room, parks)
    if kind is DynamicLayer:
        return EvictedLayer(parks) if room is None else StaticEvictedLayer(room, parks)
    if kind is DynamicSlidingWindowLayer:
        window = layer.sliding_window
        return UncompressedSlidingLayer(window) if room is None else StaticSlidingLayer(room, window)
    if kind is LinearAttentionLayer:
        return RecurrentLayer(layer.number_of_states)
    if kind is LinearAttentionAndFullAttentionLayer:
        states = layer.number_of_states
        return MixedLayer(states, parks) if room is None else StaticMixedLayer(states, room, parks)
    if kind is LinearAttentionAndSlidingWindowAttentionLayer:
        states, window = layer.number_of_states, layer.sliding_window
        return MixedSlidingLayer(states, window) if room is None else StaticMixedSlidingLayer(states, room, window)
    if kind.__name__ == "DummyLayer":
        return layer
    reason = _REASONS.get(kind.__name__)
    if reason is not None:
        raise NotImplementedError(
            f"layer {index} of this model ({config.model_type}) cannot be evicted: {reason}. {INSTEAD}"
        )
    raise NotImplementedError(
        f"layer {index} of this model ({config.model_type}) keeps its state in a {kind.__name__}, which is a kind of "
        f"layer that LookaheadCache does not know (transformers {transformers.__version__}). {INSTEAD}"
    )
