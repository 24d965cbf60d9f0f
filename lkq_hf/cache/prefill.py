"""The one forward in which a prompt is read, scored and evicted.

Two hooks on the decoder, inert unless a :class:`LookaheadCache` without a prompt is passed. Before the forward, the
scorer's suffix (learned lookahead tokens, or nothing) is appended to the input; after each layer's attention the
layer's entries are scored and evicted; after the forward, the suffix is cut off the output.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from lkq_hf.attention import start_observing, thread_state
from lkq_hf.cache.cache import LookaheadCache
from lkq_hf.cache.decode import decoding, next_token_mask
from lkq_hf.cache.guards import guard_method, refuse_chunked_prompts, refuse_in, refuse_replica
from lkq_hf.cache.layers import EvictedLayer, UncompressedSlidingLayer
from lkq_hf.compat import find_cache, pass_cache, rename_cache, require_cache_support
from lkq_hf.quantization.shared_input import weights_fixed
from lkq_hf.scoring import PrefillAttention, Scorer

MASKS_ATTRIBUTE = "create_masks_for_generate"


class EvictionHandle:
    """Undoes :func:`prepare_model_for_eviction`: call :meth:`remove`, or use as a context manager."""

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
    """Lets a model read prompts into a :class:`LookaheadCache`; needed once, and only for models without an adapter.

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
    if not getattr(decoder, "_supports_attention_backend", False) or not hasattr(
        decoder.config, "_attn_implementation"
    ):
        raise NotImplementedError(
            f"{type(decoder).__name__} does not use transformers' attention interface, through which LookaheadCache "
            "sees queries and keys. Generate with DynamicCache for this model."
        )
    if any(hook is _before_forward for hook in decoder._forward_pre_hooks.values()):
        return EvictionHandle([])
    undo: list[Callable[[], object]] = [
        decoder.register_forward_pre_hook(_before_forward, with_kwargs=True).remove,
        decoder.register_forward_hook(_after_forward, with_kwargs=True, always_call=True).remove,
        guard_method(decoder, "forward", _forward_or_clean_up),
    ]
    base: Any = _base_model(model)
    if hasattr(base, "generate"):
        create_masks = getattr(type(base), MASKS_ATTRIBUTE, create_masks_for_generate)
        setattr(base, MASKS_ATTRIBUTE, partial(_create_masks_for_generate, create_masks))
        undo.append(partial(base.__dict__.pop, MASKS_ATTRIBUTE, None))
        undo.append(guard_method(base, "generate", _generate))
    if decoder not in (base, base.base_model):
        undo.append(guard_method(base, "forward", _remember_inputs))
    return EvictionHandle(undo)


def _generate(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Guards ``generate``, for what a LookaheadCache needs from the prompt's first to the answer's last token."""
    cache = find_cache(kwargs, LookaheadCache)
    if cache is None:
        return generate(*args, **kwargs)
    kwargs = rename_cache(kwargs, cache)
    model: Any = generate.__self__  # type: ignore[attr-defined]
    refuse_chunked_prompts(model.generation_config, args, kwargs)
    if not cache.is_compileable:
        return generate(*args, **kwargs)
    with decoding(get_decoder(model)), weights_fixed(model):
        return generate(*args, **kwargs)


def _create_masks_for_generate(create_masks: Callable[..., Any], **kwargs: Any) -> Any:
    """What ``generate`` calls, by the name that a model may define, to prepare masks for a compileable cache.

    The mask of a prompt stays as it is: eviction has to see the padding, and a prefill, which is not compiled, makes
    its masks by itself. That of a single token is made in fewer steps, where no model has masks of its own.
    """
    cache = find_cache(kwargs, LookaheadCache)
    if cache is not None:
        if not cache.has_prompt:
            return kwargs.get("attention_mask")
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
    if not isinstance(decoder, PreTrainedModel):
        raise TypeError(
            f"expected a decoder-only language model of transformers, found {type(base).__name__} without a decoder"
        )
    if any(hasattr(layer, "layer_idx") and getattr(layer, "is_causal", True) is False for layer in decoder.modules()):
        raise TypeError(
            f"expected a decoder-only language model of transformers, found {type(base).__name__}, an encoder: its "
            "tokens attend to those that follow"
        )
    return decoder


@dataclass
class _Prefill:
    """A compressing forward under way."""

    decoder: PreTrainedModel
    cache: LookaheadCache
    scorer: Scorer
    batch: int
    length: int
    suffix_length: int
    mask: torch.Tensor | None
    budget: int
    stop_observing: Callable[[], None] = field(init=False)

    def start(self) -> None:
        self.stop_observing = start_observing(self.decoder, self.observe)
        thread_state.lookahead_length = self.suffix_length if self.scorer.uses_adapter else 0
        thread_state.token_shape = (self.batch, self.length + self.suffix_length)
        _thread.prefill = self

    def observe(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> None:
        """Scores and evicts one layer, right after its attention."""
        layer_index: int = module.layer_idx  # type: ignore[assignment]
        layer = self.cache.layers[layer_index] if layer_index < len(self.cache.layers) else None
        if not isinstance(layer, EvictedLayer) or not layer.awaits_eviction_of(key, value):
            return
        mask = None if self.mask is None else self.mask.to(key.device)
        scaling = options.get("scaling")
        attention = PrefillAttention(
            query=query,
            key=key,
            value=value,
            length=self.length,
            suffix_length=self.suffix_length,
            budget=self.budget,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=options.get("softcap"),
            mask=mask,
            layer_index=layer_index,
        )
        scores = self.scorer.score(attention).float()  # of a float64 model, float64
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        layer.evict(key, value, scores, self.budget, defer=self.cache.records_past)

    def finish(self) -> None:
        """Puts everything back as it was, but for the cache, which now holds the prompt."""
        _thread.prefill = None
        thread_state.lookahead_length = 0
        self.stop_observing()

    def check_all_layers_evicted(self) -> None:
        missed = [
            i for i, layer in enumerate(self.cache.layers) if isinstance(layer, EvictedLayer) and not layer.tokens_seen
        ]
        if missed:
            self.cache.reset()
            raise NotImplementedError(
                f"the attention of layers {missed} of {type(self.decoder).__name__} could not be observed, so "
                "their cache cannot be compressed. Generate with DynamicCache for this model."
            )


class _Thread(threading.local):
    def __init__(self) -> None:
        self.prefill: _Prefill | None = None
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
        _abandon_prefill()
        raise


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


def _abandon_prefill() -> None:
    prefill = _thread.prefill
    if prefill is not None:
        prefill.finish()
        # What the layers hold is of no use, and the caller may want to try again.
        prefill.cache.reset()


def _before_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # An interrupt may also come between this function and the forward that it prepares.
    _abandon_prefill()
    refuse_replica(decoder)
    kwargs = _by_name(decoder, args, kwargs)
    cache = find_cache(kwargs, LookaheadCache)
    if cache is None or cache.has_prompt:
        return None
    inputs = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    batch, length = inputs.shape[:2]
    refuse_in(decoder, kwargs, length)
    scorer = cache.scorer.bind(decoder)
    cache.build_layers(decoder.config)
    budget = cache.entries_to_keep(length)
    if budget == length:
        return None
    given_mask = kwargs.get("attention_mask")
    if isinstance(given_mask, dict) and _thread.outer_inputs:
        given_mask = _thread.outer_inputs.get("attention_mask")
    mask = _padding_mask(given_mask, length)
    suffix = scorer.suffix(decoder)
    if suffix is not None and given_mask is not kwargs.get("attention_mask"):
        _refuse_masks_of_pictures(decoder, kwargs, given_mask)
        kwargs = kwargs | {"attention_mask": given_mask}  # the decoder makes the same of it, but longer
    kwargs, suffix_length = _append_suffix(decoder, kwargs, suffix, length)
    for layer in cache.layers:
        if isinstance(layer, EvictedLayer):
            layer.begin_prefill()
        elif isinstance(layer, UncompressedSlidingLayer):
            layer.begin_prefill(length)
    prefill = _Prefill(decoder, cache, scorer, batch, length, suffix_length, mask, budget)
    prefill.start()
    return (), kwargs


def _after_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    prefill = _thread.prefill
    if prefill is None or prefill.decoder is not decoder:
        return None
    if output is None:  # the forward raised
        _abandon_prefill()
        return None
    prefill.finish()
    prefill.check_all_layers_evicted()
    return _trim(output, prefill.batch, prefill.length, prefill.length + prefill.suffix_length)


def _refuse_masks_of_pictures(decoder: PreTrainedModel, inputs: dict[str, Any], padding_mask: Any) -> None:
    """Refuses masks other than those that the decoder makes by itself: of these no longer ones can be made."""
    own = create_masks_for_generate(
        config=decoder.config,
        inputs_embeds=inputs["inputs_embeds"],
        attention_mask=padding_mask,
        **pass_cache(find_cache(inputs, LookaheadCache)),
        position_ids=inputs.get("position_ids"),
        or_mask_function=lambda *_: torch.tensor(False),  # masks as tensors, also where a causal one needs none
    )
    for name, mask in inputs["attention_mask"].items():
        if mask is not None and not (isinstance(mask, torch.Tensor) and torch.equal(mask, own[name])):
            raise NotImplementedError(
                f"{type(decoder).__name__} was given attention masks that are not only causal, as for pictures: they "
                'do not allow for appended tokens. Choose a scorer without them, such as "snapkv".'
            )


def _padding_mask(attention_mask: Any, length: int) -> torch.Tensor | None:
    """``[batch, length]``, True for real tokens; None if there is no padding.

    Raises:
        ValueError: a mask other than one value per token, or padding anywhere but on the left.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise ValueError(
            "LookaheadCache needs an attention_mask of shape [batch, length] with one value per token, got "
            + (
                f"shape {tuple(attention_mask.shape)}"
                if isinstance(attention_mask, torch.Tensor)
                else "a prepared mask"
            )
        )
    if attention_mask.shape[1] != length:
        raise ValueError(
            f"the attention_mask covers {attention_mask.shape[1]} tokens, but the prompt has {length}: pass one value "
            "per token of the prompt"
        )
    mask = attention_mask.bool()
    if mask.all():
        return None
    if not mask.any(-1).all():
        raise ValueError(
            f"row {int(mask.any(-1).int().argmin())} of the batch is padding only: every prompt needs at least one "
            "token"
        )
    if not mask[:, -1].all():
        raise ValueError(
            'the batch is padded on the right. Pad prompts on the left: tokenizer(..., padding_side="left").'
        )
    if (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError(
            "the attention_mask hides tokens in the middle of a prompt. Put a row's padding on its left, and leave "
            "tokens out of the prompt that are not to be read."
        )
    return mask


_EXTENDED = ("attention_mask", "position_ids")


def _append_suffix(
    decoder: PreTrainedModel, kwargs: dict[str, Any], suffix: torch.Tensor | None, length: int
) -> tuple[dict[str, Any], int]:
    """The decoder's inputs with the suffix behind the prompt, at the positions that follow it."""
    if suffix is None:
        return kwargs, 0
    if getattr(decoder.config, "hidden_size_per_layer_input", None):
        raise NotImplementedError(
            f"{type(decoder).__name__} embeds every token once per layer, which appended tokens do not have. "
            'Choose a scorer without them, such as "snapkv".'
        )
    kwargs = dict(kwargs)
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = decoder.get_input_embeddings()(kwargs.pop("input_ids"))
    suffix = suffix.to(embeds).expand(embeds.shape[0], -1, -1)
    suffix_length = suffix.shape[1]
    kwargs["inputs_embeds"] = torch.cat([embeds, suffix], dim=1)
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = F.pad(kwargs["attention_mask"], (0, suffix_length), value=1)
    for name, value in kwargs.items():
        # What else is said of each token, such as where pictures are: nothing of these.
        if name not in _EXTENDED and isinstance(value, torch.Tensor) and value.shape == (embeds.shape[0], length):
            kwargs[name] = F.pad(value, (0, suffix_length))
    _refuse_beyond_learned_positions(decoder, length, suffix_length)
    positions = kwargs.get("position_ids")
    bound = _bound_of_positions(decoder.config, positions, length)
    if positions is None and bound is not None:
        positions = torch.arange(length, device=embeds.device)[None]
    if positions is not None:
        following = positions[..., -1:] + torch.arange(1, suffix_length + 1, device=positions.device)
        kwargs["position_ids"] = torch.cat(
            [positions, following if bound is None else following.clamp(max=bound)], dim=-1
        )
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = torch.arange(length + suffix_length, device=embeds.device)
    return kwargs, suffix_length


def _refuse_beyond_learned_positions(decoder: PreTrainedModel, length: int, suffix_length: int) -> None:
    most = getattr(decoder.config, "max_position_embeddings", None)
    rotary = getattr(decoder.config, "rope_parameters", None)
    if most is not None and not rotary and length <= most < length + suffix_length:
        raise ValueError(
            f"the prompt has {length} tokens, and {type(decoder).__name__} has {most} positions: the {suffix_length} "
            "lookahead tokens behind the prompt do not fit. Shorten the prompt, or choose a scorer without them, such "
            'as "snapkv".'
        )


def _bound_of_positions(config: Any, positions: torch.Tensor | None, length: int) -> int | None:
    """The last position that the suffix may have, lest it change how the prompt is read; None if any will do.

    Some rotary embeddings choose the frequencies of a whole forward by the largest position in it.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    bounds = []
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = parameters.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        last = length - 1 if positions is None else int(positions.max())
        if kind == "dynamic":
            # Beyond the trained length, every longer text has frequencies of its own.
            bounds.append(max(last, config.max_position_embeddings - 1))
        elif last < (original := parameters.get("original_max_position_embeddings", config.max_position_embeddings)):
            # One set of frequencies up to this length, another beyond.
            bounds.append(original - 1)
    return min(bounds, default=None)


def _trim(value: Any, batch: int, length: int, total: int) -> Any:
    """Cuts the appended positions off everything the decoder returns."""
    if length == total:
        return value
    if isinstance(value, torch.Tensor):
        if value.ndim == 4 and value.shape[-2:] == (total, total):
            return value[..., :length, :length]
        if value.ndim == 2 and value.shape[0] == batch * total:  # a router's logits
            return value.unflatten(0, (batch, total))[:, :length].flatten(0, 1)
        return value[:, :length] if value.ndim == 3 and value.shape[1] == total else value
    if isinstance(value, ModelOutput):
        for name in list(value):
            value[name] = _trim(value[name], batch, length, total)
        return value
    if isinstance(value, tuple):
        return tuple(_trim(element, batch, length, total) for element in value)
    return value
