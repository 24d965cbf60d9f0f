"""What eviction needs around two methods of a model, because a hook cannot do it.

Both are set on the one object, as accelerate does for offloaded modules; the class stays as it is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lkq_hf.compat import CHUNKED_TURNS_SINCE, later_chunks_work


def guard_method(owner: nn.Module, name: str, guard: Callable[..., Any]) -> Callable[[], None]:
    """Makes ``owner.name(...)`` call ``guard(method, ...)``, and returns what undoes it."""
    method = getattr(owner, name)
    # A partial, unlike a closure, is copied and pickled with its owner.
    guarded: Any = partial(guard, method)
    guarded.__wrapped__ = method  # its signature
    own = owner.__dict__.get(name)
    owner.__dict__[name] = guarded

    def undo() -> None:
        if owner.__dict__.get(name) is guarded:
            del owner.__dict__[name]
            if own is not None:
                owner.__dict__[name] = own

    return undo


def length_read_in_chunks(
    defaults: GenerationConfig, seen: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int | None:
    """The length of the text that ``generate`` is going to read piece by piece; None if it reads it at once.

    Args:
        defaults: the model's own.
        seen: tokens that were read before.
        args, kwargs: what ``generate`` is called with.

    Raises:
        ValueError: the chunks are smaller than one token.
        NotImplementedError: this version of transformers cannot read a later turn in chunks.
    """
    chunk_size = generation_option("prefill_chunk_size", defaults, args, kwargs)
    if chunk_size is None:
        return None
    if chunk_size < 1:
        raise ValueError(f"prefill_chunk_size must be at least 1 token, got {chunk_size}; None reads a prompt at once")
    if seen and not later_chunks_work():
        raise NotImplementedError(
            f"transformers {transformers.__version__} begins at the start of the text when it reads a later turn in "
            "chunks. Pass prefill_chunk_size=None for later turns, or install transformers "
            f"{CHUNKED_TURNS_SINCE} or newer."
        )
    mask = kwargs.get("attention_mask")
    given = _prompt_length(args, kwargs)
    length = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else max(given, seen + 1)
    return length if length - seen > chunk_size else None


def generation_option(name: str, defaults: GenerationConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``generate`` will use: its own argument, else that of the config passed to it, else the model's."""
    if name in kwargs:
        return kwargs[name]
    passed = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    found = None if passed is None else getattr(passed, name)
    return getattr(defaults, name) if found is None else found


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    given = (args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    return max((tensor.shape[1] for tensor in given if tensor is not None), default=1)


def refuse_in(decoder: PreTrainedModel, kwargs: dict[str, Any], length: int) -> None:
    """Raises what is to be said about a forward that cannot fill a LookaheadCache, before it does any work.

    Args:
        decoder: the stack of layers.
        kwargs: what it is called with.
        length: tokens of the prompt.

    Raises:
        ValueError, NotImplementedError: with what to do instead.
    """
    if length == 0:
        raise ValueError(
            "the prompt is empty: LookaheadCache needs at least one token. Pass a prompt, or leave input_ids out to "
            "start from the model's beginning-of-sequence token."
        )
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False and a LookaheadCache contradict each other: leave one of them out.")
    if kwargs.get("encoder_hidden_states") is not None:
        raise NotImplementedError(
            f"{type(decoder).__name__} was given encoder_hidden_states, which its layers keep in the cache beside the "
            "text. LookaheadCache holds tokens of the text only: leave them out, or generate with transformers' own "
            "EncoderDecoderCache."
        )
    if decoder.training and any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        raise ValueError(
            "gradient checkpointing in training mode takes the cache away from the layers. Call model.eval() or "
            "model.gradient_checkpointing_disable() before reading a prompt into a LookaheadCache."
        )


def refuse_replica(decoder: nn.Module) -> None:
    """Raises for a copy made by ``nn.DataParallel``, whose methods still belong to the original.

    Raises:
        NotImplementedError: ``decoder`` is such a copy.
    """
    if getattr(decoder, "_is_replica", False):
        raise NotImplementedError(
            "nn.DataParallel does not support a model that was prepared for LookaheadCache. Start one process for "
            "each GPU (accelerate launch, torchrun), or spread one model over the GPUs with device_map."
        )
