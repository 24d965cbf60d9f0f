"""A forward's inputs with tokens appended for this forward only, and its outputs without them."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from lkq_hf.compat import find_cache, pass_cache
from lkq_hf.scoring import Scorer
from lkq_hf.scoring.base import PerLayerEmbedding

_EXTENDED = ("attention_mask", "position_ids")


def suffix_inputs(
    decoder: PreTrainedModel, suffix: torch.Tensor, rows: torch.Tensor | None, batch: int
) -> dict[str, torch.Tensor]:
    """What a decoder embeds in a forward of the suffix alone.

    Args:
        decoder: the stack of layers.
        suffix: embeddings, ``[1, suffix_length, hidden]``.
        rows: its embeddings for each layer, ``[1, suffix_length, layers, hidden_per_layer]``, if the model has such.
        batch: rows of the forward.
    """
    inputs = {"inputs_embeds": suffix.to(decoder.dtype).expand(batch, -1, -1)}
    if rows is not None:
        inputs["per_layer_inputs"] = rows.to(decoder.dtype).expand(batch, -1, -1, -1)
    return inputs


def append_suffix(
    decoder: PreTrainedModel, kwargs: dict[str, Any], scorer: Scorer, suffix: torch.Tensor, length: int, seen: int
) -> dict[str, Any]:
    """The decoder's inputs with the suffix behind them, at the positions that follow.

    Args:
        decoder: the stack of layers.
        kwargs: what it is called with.
        scorer: whose suffix it is.
        suffix: embeddings, ``[1 or batch, suffix_length, hidden]``.
        length: tokens of this forward.
        seen: tokens that were read before.

    Raises:
        NotImplementedError, ValueError: the model embeds tokens once per layer, and these embeddings are missing.
        ValueError: the model has no positions for the suffix.
    """
    kwargs = dict(kwargs)
    if (per_layer := PerLayerEmbedding.of(decoder)) is not None:
        kwargs["per_layer_inputs"] = torch.cat(_rows(decoder, kwargs, scorer, per_layer), dim=1)
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
    _refuse_beyond_learned_positions(decoder, seen + length, suffix_length)
    positions = kwargs.get("position_ids")
    bound = _bound_of_positions(decoder.config, positions, seen + length)
    if positions is None and bound is not None:
        positions = torch.arange(seen, seen + length, device=embeds.device)[None]
    if positions is not None:
        following = positions[..., -1:] + torch.arange(1, suffix_length + 1, device=positions.device)
        kwargs["position_ids"] = torch.cat(
            [positions, following if bound is None else following.clamp(max=bound)], dim=-1
        )
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = torch.arange(seen, seen + length + suffix_length, device=embeds.device)
    if isinstance(kept := kwargs.get("logits_to_keep"), int) and kept:
        # Some decoders let only these positions into their last layers.
        kwargs["logits_to_keep"] = kept + suffix_length
    return kwargs


def _rows(
    decoder: PreTrainedModel, kwargs: dict[str, Any], scorer: Scorer, per_layer: PerLayerEmbedding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings for each layer of the text and of the suffix.

    Raises:
        ValueError: the text is given by its embeddings alone.
        NotImplementedError: the scorer has none for its suffix.
    """
    name = type(decoder).__name__
    rows = kwargs.get("per_layer_inputs")
    if rows is None and kwargs.get("input_ids") is None:
        raise ValueError(
            f"{name} embeds every token once per layer as well, and only inputs_embeds were passed. Pass input_ids, "
            "or per_layer_inputs=decoder.get_per_layer_inputs(input_ids) beside inputs_embeds."
        )
    rows = per_layer.embed(kwargs["input_ids"]) if rows is None else rows
    suffix = scorer.suffix_per_layer(decoder)
    if suffix is None:
        raise NotImplementedError(
            f"{name} embeds every token once per layer as well, and {type(scorer).__name__} has no such embeddings "
            "for the tokens that it appends: implement suffix_per_layer, or choose a scorer without appended tokens, "
            'such as "snapkv".'
        )
    return rows, suffix.to(rows).expand(rows.shape[0], -1, -1, -1)


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


def trim(value: Any, batch: int, length: int, suffix_length: int) -> Any:
    """Cuts the suffix off everything the decoder returns.

    Args:
        value: an output of the decoder, or all of them.
        batch: rows.
        length: tokens of this forward, without the suffix.
        suffix_length: tokens appended.
    """
    total = length + suffix_length
    if suffix_length == 0:
        return value
    if isinstance(value, torch.Tensor):
        if value.ndim == 4 and value.shape[-2] == total:  # attention
            return value[..., :length, :-suffix_length]
        if value.ndim == 2 and value.shape[0] == batch * total:  # a router's logits
            return value.unflatten(0, (batch, total))[:, :length].flatten(0, 1)
        # A decoder may return the last positions only, of which the suffix is the end all the same.
        return value[:, :-suffix_length] if value.ndim == 3 and value.shape[1] > suffix_length else value
    if isinstance(value, ModelOutput):
        for name in list(value):
            value[name] = trim(value[name], batch, length, suffix_length)
        return value
    if isinstance(value, tuple):
        return tuple(trim(element, batch, length, suffix_length) for element in value)
    return value


def refuse_masks_of_pictures(decoder: PreTrainedModel, inputs: dict[str, Any], padding_mask: Any) -> None:
    """Refuses masks other than those that the decoder makes by itself: of these no longer ones can be made."""
    own = create_masks_for_generate(
        config=decoder.config,
        inputs_embeds=inputs["inputs_embeds"],
        attention_mask=padding_mask,
        **pass_cache(find_cache(inputs, Cache)),
        position_ids=inputs.get("position_ids"),
        or_mask_function=lambda *_: torch.tensor(False),  # masks as tensors, also where a causal one needs none
    )
    for name, mask in inputs["attention_mask"].items():
        if mask is not None and not (isinstance(mask, torch.Tensor) and torch.equal(mask, own[name])):
            raise NotImplementedError(
                f"{type(decoder).__name__} was given attention masks that are not only causal, as for pictures: they "
                'do not allow for appended tokens. Choose a scorer without them, such as "snapkv".'
            )
