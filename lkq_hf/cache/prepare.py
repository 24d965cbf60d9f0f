"""Hooks that let a model fill a `LookaheadCache`: what happens around its decoder and its ``generate``.

``generate`` -> decoder -> `_before_forward` decides what kind of forward this is -> each attention goes through
`lkq_hf.cache.reading` -> `_after_forward` evicts. Nothing happens unless a LookaheadCache is passed.
"""

import threading
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from lkq_hf.attention import implementation_of, thread_state
from lkq_hf.cache.batching import refuse_cache
from lkq_hf.cache.decode import decoding, masks_are_known, next_token_mask
from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.guards import guard_method, length_read_in_chunks, refuse_in, refuse_replica
from lkq_hf.cache.loop import DecodingLoop, can_be_recorded, with_decoding_loop
from lkq_hf.cache.modules import (
    attention_modules,
    forgets,
    number_attention,
    recurrent_modules,
    refuse_other_layers,
    refuse_own_cache,
)
from lkq_hf.cache.padding import padding_mask
from lkq_hf.cache.reading import Decoding, Reading
from lkq_hf.cache.recurrent import read_one_by_one
from lkq_hf.cache.refresh import begin_refresh, refresh_steadily
from lkq_hf.cache.suffix import append_suffix, refuse_masks_of_pictures, trim
from lkq_hf.cache.turns import begin_turn
from lkq_hf.compat import find_cache, rename_cache, require_cache_support
from lkq_hf.kernels.shared_product import weights_fixed
from lkq_hf.scoring import Scorer

MASKS_ATTRIBUTE = "create_masks_for_generate"


class EvictionHandle:
    """Undoes `prepare_model_for_eviction`: call `remove`, or use as a context manager."""

    def __init__(self, undo: list[Callable[[], object]]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Takes the hooks off the model again. Does nothing when called twice."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "EvictionHandle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def prepare_model_for_eviction(model: nn.Module) -> EvictionHandle:
    """Lets a model read prompts into a `LookaheadCache`; needed once, and only for models without an adapter.

    Loading a ``LOOKAHEAD_KV`` adapter does the same. The hooks do nothing unless a LookaheadCache is passed.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.

    Returns:
        A handle whose ``remove()``, or whose end as a context manager, takes the hooks off again. Nothing was added,
        and nothing will be removed, if the model was already prepared.

    Raises:
        TypeError: not a transformers model with a decoder.
        NotImplementedError: the model's attention cannot be observed.
        ImportError: this version of transformers passes caches in a way that is not known here.
    """
    require_cache_support()
    decoder = get_decoder(model)
    number_attention(decoder)
    attention_modules(decoder)  # raises where they cannot be observed
    refuse_own_cache(decoder)
    if any(hook is _before_forward for hook in decoder._forward_pre_hooks.values()):
        return EvictionHandle([])
    undo: list[Callable[[], object]] = [
        decoder.register_forward_pre_hook(_before_forward, with_kwargs=True).remove,
        decoder.register_forward_hook(_after_forward, with_kwargs=True, always_call=True).remove,
        guard_method(decoder, "forward", _forward_or_clean_up),
    ]
    for module in recurrent_modules(decoder):
        undo.append(guard_method(module, "forward", partial(_recur, module, forgets(module))))
    base: Any = _base_model(model)
    if hasattr(base, "generate"):
        create_masks = getattr(type(base), MASKS_ATTRIBUTE, create_masks_for_generate)
        setattr(base, MASKS_ATTRIBUTE, partial(_create_masks_for_generate, decoder, create_masks))
        undo.append(partial(base.__dict__.pop, MASKS_ATTRIBUTE, None))
        undo.append(guard_method(base, "generate", _generate))
    if hasattr(base, "generate_batch"):
        undo.append(guard_method(base, "generate_batch", refuse_cache))
    if decoder not in (base, base.base_model):
        undo.append(guard_method(base, "forward", _remember_inputs))
    return EvictionHandle(undo)


def prepare_model_for_decoding_loop(model: nn.Module) -> EvictionHandle | None:
    """As `prepare_model_for_eviction`, if ``generate`` then decodes by the loop of a cache with static shapes.

    Args:
        model: any.

    Returns:
        The handle; None, and nothing was added, where ``generate`` would take another way.
    """
    base: Any = _base_model(model)
    if not can_be_recorded(base) or base.generation_config.cache_implementation not in (None, "hybrid"):
        return None
    try:
        handle = prepare_model_for_eviction(model)
    except (TypeError, NotImplementedError):
        return None
    decoder, cache = get_decoder(model), EvictedCache(1.0, "streaming", max_new_tokens=1)
    try:
        cache.build_layers(decoder.config)
        refuse_other_layers(decoder, cache.evicted_layers())
        if masks_are_known(cache.layers, base.config):
            return handle
    except (ValueError, NotImplementedError):
        pass
    handle.remove()
    return None


def _generate(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Guards ``generate``, for what a LookaheadCache needs from the prompt's first to the answer's last token."""
    cache = find_cache(kwargs, EvictedCache)
    if cache is None:
        return generate(*args, **kwargs)
    kwargs = rename_cache(kwargs, cache)
    model: Any = generate.__self__  # type: ignore[attr-defined]
    with cache.generation.under_way():
        turn = begin_turn(cache, model.generation_config, args, kwargs)
        cache.begin_turn(length_read_in_chunks(model.generation_config, int(cache.get_seq_length()), args, kwargs))
        if cache.is_compileable:
            decoder = get_decoder(model)
            kwargs = with_decoding_loop(DecodingLoop(model, decoder, cache, refresh), args, kwargs)
            with decoding(decoder, cache), weights_fixed(model):
                output = generate(*args, **kwargs)
        else:
            output = generate(*args, **kwargs)
        turn.end(output)
    return output


def _create_masks_for_generate(decoder: PreTrainedModel, create_masks: Callable[..., Any], **kwargs: Any) -> Any:
    """What ``generate`` calls, by the name that a model may define, to prepare masks for a compileable cache.

    The mask of what is read stays as it is: eviction has to see the padding, and a forward that reads, which is not
    compiled, makes its masks by itself. That of a single token is made in fewer steps, where no model has masks of its
    own.
    """
    cache = find_cache(kwargs, EvictedCache)
    if cache is not None:
        if cache.will_read(kwargs["inputs_embeds"].shape[1]) or not cache.has_prompt:
            return kwargs.get("attention_mask")
        cache.end_pieces(kwargs["inputs_embeds"].shape[1])
        if cache.refresh_is_due():
            refresh(decoder, cache, kwargs.get("attention_mask"))  # outside of what is compiled
        if create_masks is create_masks_for_generate and (mask := next_token_mask(cache, **kwargs)) is not None:
            return mask
    return create_masks(**kwargs)


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def get_decoder(model: nn.Module) -> PreTrainedModel:
    """The stack of decoder layers inside a transformers model (the text model of a multimodal one).

    Raises:
        TypeError: the model has none, or is an encoder.
    """
    base: Any = _base_model(model)
    decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else None
    while hasattr(decoder, "lm_head") and hasattr(decoder, "model"):  # a language model inside of a multimodal one
        decoder = decoder.model
    if not isinstance(decoder, PreTrainedModel) and isinstance(base, PreTrainedModel):
        decoder = base.base_model  # the other was a head by this name (ModernBERT)
    if not isinstance(decoder, PreTrainedModel):
        raise TypeError(
            f"expected a decoder-only language model of transformers, found {type(base).__name__} without a decoder"
        )
    if getattr(base.config, "is_encoder_decoder", False):
        raise TypeError(
            f"expected a decoder-only language model of transformers, found {type(base).__name__}, an encoder and a "
            "decoder: the prompt is in the encoder's output, not in the cache"
        )
    causal = [layer.is_causal for layer in decoder.modules() if hasattr(layer, "layer_idx") and _has_direction(layer)]
    if causal and not any(causal) and not getattr(decoder.config, "is_decoder", False):
        raise TypeError(
            f"expected a decoder-only language model of transformers, found {type(base).__name__}, an encoder: its "
            "tokens attend to those that follow"
        )
    return decoder


def _has_direction(module: nn.Module) -> bool:
    return isinstance(getattr(module, "is_causal", None), bool)


class _Thread(threading.local):
    def __init__(self) -> None:
        # The forward of a decoder under way that fills a LookaheadCache.
        self.forward: Reading | Decoding | None = None
        # A refresh that is about to begin.
        self.refresh: Reading | None = None
        # Keyword arguments of the model around the decoder, where there is more than a language model's head.
        self.outer_inputs: dict[str, Any] = {}


_thread = _Thread()


def _forward_or_clean_up(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Guards the decoder's forward: hooks run after an error, but not after Ctrl-C (KeyboardInterrupt)."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    try:
        return forward(*args, **kwargs)
    except BaseException:
        _abandon_forward()
        raise


def _recur(module: nn.Module, forgets: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Guards the forward of a module with a recurrent state."""
    if forgets and (cache := _cache_among(*args, *kwargs.values())) is not None:
        forward = partial(read_one_by_one, cache.layers[module.layer_idx], forward)  # type: ignore[index]
    if thread_state.recur is None:
        return forward(*args, **kwargs)
    return _recur_uncompiled(module, forward, args, kwargs)


def _cache_among(*arguments: Any) -> EvictedCache | None:
    return next((each for each in arguments if isinstance(each, EvictedCache)), None)


@torch.compiler.disable
def _recur_uncompiled(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # A compiled forward would hold on to what one thread asked for once.
    recur = thread_state.recur
    return forward(*args, **kwargs) if recur is None else recur(module, forward, args, kwargs)


def _remember_inputs(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Guards a multimodal model's forward: some give their decoder masks made from the one that they were given."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    model: Any = forward.__self__  # type: ignore[attr-defined]
    outer, _thread.outer_inputs = _thread.outer_inputs, _by_name(model, args, kwargs)
    try:
        return forward(*args, **kwargs)
    finally:
        _thread.outer_inputs = outer


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the model's forward by their names."""
    if not args:
        return kwargs
    names = list(signature(type(model).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _abandon_forward() -> None:
    forward, _thread.forward = _thread.forward, None
    if forward is not None:
        forward.abandon()


def _before_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = _by_name(decoder, args, kwargs)
    cache = find_cache(named, EvictedCache)
    if cache is None and _thread.forward is None:
        return None
    in_decode = thread_state.attend_compiles and _thread.refresh is None
    if in_decode and cache is not None and cache.has_prompt and not cache.expects_turn and _length(named) == 1:
        return None  # a step of a compiled decode, around the whole of which `decoding` is already
    return _begin_forward(decoder, cache, named)


def _length(kwargs: dict[str, Any]) -> int:
    """Tokens of a forward."""
    inputs = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    return inputs.shape[1]


# torch 2.13 loses what a traced function writes to a threading.local.
@torch.compiler.disable(reason="a compiled model fills a LookaheadCache inside of lkq_hf.cache.decoding(model, cache)")
def _begin_forward(decoder: PreTrainedModel, cache: EvictedCache | None, kwargs: dict[str, Any]) -> Any:
    """Decides whether a forward reads, and prepares it; returns its changed arguments, or None."""
    # An interrupt may also come between this function and the forward that it prepares.
    _abandon_forward()
    if cache is None:
        return None
    if (prepared := _thread.refresh) is not None:
        _thread.refresh, _thread.forward = None, prepared
        prepared.start()
        return None
    refuse_replica(decoder)
    cache.generation.refuse_other_thread()
    kwargs, changed = _without_slicing_block_masks(decoder, kwargs)
    length = _length(kwargs)
    if not cache.has_prompt:
        refuse_in(decoder, kwargs, length)
        cache.build_layers(decoder.config)
        refuse_other_layers(decoder, cache.evicted_layers())
        cache.remember_model(decoder)
    reads = cache.will_read(length)
    cache.record_text(kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else None, length)
    cache.end_turn_begin()
    scorer = _bind(decoder, cache) if reads else None
    if scorer is not None:
        return _begin_reading(decoder, cache, scorer, kwargs, length)
    if cache.refresh_is_due():
        refresh(decoder, cache, kwargs.get("attention_mask"))
    if cache.has_prefix or cache.observed_queries or cache.queries_of_pieces:
        mask = kwargs.get("attention_mask")
        text_mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        _thread.forward = Decoding(decoder, cache, text_mask)
        _thread.forward.start()
    return ((), kwargs) if changed else None


def _without_slicing_block_masks(decoder: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The arguments, and whether they were changed.

    Decoders that read only the last positions in their last layers cut their masks for it, which flex attention's do
    not allow. They know it by the name of the attention, which now is another.
    """
    if implementation_of(decoder.config) != "flex_attention" or "logits_to_keep" not in _parameters(
        type(decoder).forward
    ):
        return kwargs, False
    return kwargs | {"logits_to_keep": None}, True


@lru_cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(signature(forward).parameters)


def refresh(decoder: PreTrainedModel, cache: EvictedCache, attention_mask: torch.Tensor | None = None) -> None:
    """Evicts what a long answer has added to ``cache``, but for its last ``refresh_every`` tokens.

    ``generate`` and the model's forwards do this by themselves, as often as ``refresh_every`` says.

    Args:
        decoder: the stack of layers.
        cache: with ``refresh_every``.
        attention_mask: ``[batch, >= text]``, 1 for real tokens; None if there is no padding.
    """
    with torch.no_grad():
        if refresh_steadily(decoder, cache, attention_mask):
            return
    reading, inputs = begin_refresh(decoder, cache, attention_mask)
    if inputs is None:
        reading.without_forward()
        return
    _thread.refresh = reading
    with torch.no_grad():
        decoder(**inputs)


def _bind(decoder: PreTrainedModel, cache: EvictedCache) -> Scorer | None:
    """The cache's scorer for this model; None where a later turn cannot be scored and is kept whole instead.

    Raises:
        ValueError: a first prompt cannot be scored.
    """
    try:
        return cache.bind_scorer(decoder)
    except ValueError as error:
        if not cache.has_prompt:
            raise
        warnings.warn(
            f"this turn is kept whole, since it cannot be scored: {error} LookaheadCache(evict_later_turns=False) "
            "keeps later turns whole without this warning.",
            stacklevel=2,
        )
        return None


def _begin_reading(
    decoder: PreTrainedModel, cache: EvictedCache, scorer: Scorer, kwargs: dict[str, Any], length: int
) -> Any:
    seen = int(cache.get_seq_length())
    given_mask = kwargs.get("attention_mask")
    if isinstance(given_mask, dict) and _thread.outer_inputs:
        given_mask = _thread.outer_inputs.get("attention_mask")
    mask = padding_mask(given_mask, seen, length)
    suffix = scorer.suffix(decoder)
    suffix_length = 0
    if suffix is not None:
        if given_mask is not kwargs.get("attention_mask"):
            refuse_masks_of_pictures(decoder, kwargs, given_mask)
            kwargs = kwargs | {"attention_mask": given_mask}  # the decoder makes the same of it, but longer
        kwargs = append_suffix(decoder, kwargs, scorer, suffix, length, seen)
        suffix_length = suffix.shape[1]
    inputs = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    batch = inputs.shape[0]
    eviction = cache.begin_eviction(decoder, seen + length)
    trimmed = partial(trim, batch=batch, length=length, suffix_length=suffix_length)
    _thread.forward = Reading(decoder, cache, scorer, batch, length, suffix_length, mask, eviction, trimmed)
    _thread.forward.start()
    return (), kwargs


def _after_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    forward = _thread.forward
    return None if forward is None or forward.decoder is not decoder else _end_forward(forward, output)


@torch.compiler.disable
def _end_forward(forward: Reading | Decoding, output: Any) -> Any:
    if output is None:  # the forward raised
        _abandon_forward()
        return None
    _thread.forward = None
    return forward.finish(output)
