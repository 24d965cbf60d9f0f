"""What the modules of a decoder do with a cache, told from the names in their code: their classes do not say it."""

import inspect
import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from functools import cache
from inspect import signature
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

# Decoders that were looked at, and the layers for which nothing had to be refused.
_accepted: "weakref.WeakKeyDictionary[nn.Module, set[tuple[int, ...]]]" = weakref.WeakKeyDictionary()

# By one of these names a module computes the weights of attention itself.
_OWN_ATTENTION = frozenset({"softmax", "scaled_dot_product_attention"})


def modules_calling(decoder: nn.Module, *names: str) -> list[nn.Module]:
    """Modules in whose own code one of these attributes or functions is named."""
    return [module for module in decoder.modules() if named_in(module).intersection(names)]


def recurrent_modules(decoder: nn.Module) -> list[nn.Module]:
    """Modules that keep a state of fixed size in the cache."""
    return modules_calling(decoder, "update_conv_state", "update_recurrent_state")


def forgets(module: nn.Module) -> bool:
    """Whether a recurrent module starts anew when it is given several tokens, whatever its state (Mamba 1)."""
    return "mamba_selective_scan" in named_in(module)


def number_attention(decoder: nn.Module) -> None:
    """Tells attention modules which layer of the cache they fill, where only their forward is told (Zamba, Zamba2).

    Such decoders share the weights of their attention among layers, but have a module for each of them. The index of
    the layer is written to ``layer_idx``, as others have it.
    """
    for index, layer in enumerate(getattr(decoder, "layers", ())):
        module: Any
        for module in modules_calling(layer, "update"):
            if "layer_idx" in signature(type(module).forward).parameters and hasattr(module, "layer_idx"):
                module.layer_idx = index


def attention_modules(decoder: PreTrainedModel) -> list[nn.Module]:
    """Modules that keep entries of tokens in the cache, without those that attend to what an encoder has read.

    Raises:
        NotImplementedError: there are none, or what they compute cannot be observed.
    """
    kind = type(decoder).__name__
    if getattr(decoder.config, "num_hidden_layers", None) is None:
        raise NotImplementedError(
            f"the config of {kind} has no num_hidden_layers, by which transformers lays out any cache. Generate with "
            "use_cache=False for this model."
        )
    caching = modules_calling(decoder, "update")
    crossing = cross_attention_modules(decoder)
    found = [module for module in caching if hasattr(module, "layer_idx") and module not in crossing]
    hidden = {type(module).__name__ for module in found if "ALL_ATTENTION_FUNCTIONS" not in named_in(module)}
    if not found:  # modules with another name for the index of their layer
        hidden = {type(module).__name__ for module in caching if named_in(module) & _OWN_ATTENTION}
    if hidden:
        raise NotImplementedError(
            f"{', '.join(sorted(hidden))} of {kind} computes attention by itself, not by one of transformers' "
            "attention functions, through which LookaheadCache sees queries and keys. Generate with DynamicCache for "
            "this model."
        )
    biased = {type(module).__name__ for module in found if _takes_position_bias(module)}
    if biased:
        raise NotImplementedError(
            f"{', '.join(sorted(biased))} of {kind} adds a bias by distance (position_bias) for each of the tokens "
            "that the cache returns, in their order; evicted ones would shift it. Generate with DynamicCache for this "
            "model."
        )
    if not found and recurrent_modules(decoder):
        raise NotImplementedError(
            f"every layer of {kind} keeps a state of fixed size: there is nothing to evict. Generate without "
            "past_key_values for this model."
        )
    if not found:
        raise NotImplementedError(
            f"no module of {kind} keeps keys and values in a cache of transformers, so there is nothing to evict. "
            "Generate without past_key_values for this model."
        )
    return found


def cross_attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """Modules that attend to what an encoder has read, beside causal ones that attend to the text."""
    found = [module for module in modules_calling(decoder, "update") if hasattr(module, "layer_idx")]
    crossing = [module for module in found if not getattr(module, "is_causal", True)]
    return crossing if len(crossing) < len(found) else []


def _takes_position_bias(module: nn.Module) -> bool:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return eager is not None and "position_bias" in signature(eager).parameters


def refuse_own_cache(decoder: nn.Module) -> None:
    """Refuses a decoder that works with a class of caches of its own only.

    Raises:
        NotImplementedError: its modeling file defines one, and its forward makes one.
    """
    file = sys.modules[type(decoder).__module__]
    for name in sorted(named_in(decoder)):
        kind = getattr(file, name, None)
        if isinstance(kind, type) and issubclass(kind, Cache) and kind.__module__ == file.__name__:
            raise NotImplementedError(
                f"{type(decoder).__name__} works with a cache of its own ({name}) only, which holds states beside "
                "keys and values. Generate without past_key_values for this model."
            )


def refuse_other_layers(decoder: PreTrainedModel, layers: Collection[int]) -> None:
    """Refuses a decoder whose attention modules and layers of a cache do not correspond; looks at each one once.

    Args:
        decoder: the stack of layers.
        layers: indices of those that are evicted.

    Raises:
        NotImplementedError: a layer has no module, or one that keeps something else than tokens of the text.
    """
    accepted = _accepted.setdefault(decoder, set())
    if tuple(layers) in accepted:  # every module of the decoder would be looked at, while a GPU waits
        return
    kind = type(decoder).__name__
    modules: dict[Any, nn.Module] = {module.layer_idx: module for module in attention_modules(decoder)}
    if missing := sorted(set(layers) - set(modules)):
        names = ", ".join(sorted({type(module).__name__ for module in modules.values()}))
        raise NotImplementedError(
            f"{kind} shares {names} among several layers of the cache (layer {missing[0]} is one), so a module does "
            "not say which entries are its own. Generate with DynamicCache for this model."
        )
    for index in layers:
        parameters = signature(type(modules[index]).forward).parameters
        if "cache_offset" in parameters:
            raise NotImplementedError(
                f"{kind} runs its layers in loops, and keeps entries of some loops only, or each loop's apart: what a "
                f"loop attends to is not what layer {index} of the cache returns. Generate with DynamicCache for this "
                "model."
            )
        if "cross_attention_states" in parameters:
            raise NotImplementedError(
                f"layer {index} of {kind} keeps what pictures were made of, not tokens of the text: "
                f"{type(modules[index]).__name__} reads it from the cache by itself. Generate with DynamicCache for "
                "this model."
            )
    accepted.add(tuple(layers))


def named_in(module: nn.Module) -> frozenset[str]:
    """Names of attributes and functions in the code of the module's class, and of those it inherits from."""
    kind: Any = type(module)
    return _names(kind)


@cache
def _names(kind: Any) -> frozenset[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] != "torch":
            for value in vars(base).values():
                found.update(*map(_names_in, _functions(value)))
    return frozenset(found)


def _functions(value: Any) -> Iterator[FunctionType]:
    """A function, and those that decorators have put into it."""
    seen: set[int] = set()
    waiting = [value.__func__ if isinstance(value, staticmethod | classmethod) else value]
    while waiting:
        function = waiting.pop()
        if id(function) in seen or not isinstance(function, FunctionType):
            continue
        seen.add(id(function))
        yield function
        waiting.append(inspect.unwrap(function))
        waiting += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]


def _is_filled(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, Callable)  # type: ignore[arg-type]
    except ValueError:
        return False


def _names_in(function: FunctionType) -> set[str]:
    names: set[str] = set()
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names
