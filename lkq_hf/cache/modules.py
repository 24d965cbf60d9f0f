"""What the modules of a decoder do with a cache, told from the names in their code: their classes do not say it."""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn


def modules_calling(decoder: nn.Module, *names: str) -> list[nn.Module]:
    """Modules in whose own code one of these attributes or functions is named."""
    return [module for module in decoder.modules() if named_in(module).intersection(names)]


def recurrent_modules(decoder: nn.Module) -> list[nn.Module]:
    """Modules that keep a state of fixed size in the cache."""
    return modules_calling(decoder, "update_conv_state", "update_recurrent_state")


def forgets(module: nn.Module) -> bool:
    """Whether a recurrent module starts anew when it is given several tokens, whatever its state (Mamba 1)."""
    return "mamba_selective_scan" in named_in(module)


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """Modules that keep entries of tokens in the cache.

    Raises:
        NotImplementedError: there are none, or what they compute cannot be observed.
    """
    kind = type(decoder).__name__
    found = [module for module in modules_calling(decoder, "update") if hasattr(module, "layer_idx")]
    hidden = sorted({type(module).__name__ for module in found if "ALL_ATTENTION_FUNCTIONS" not in named_in(module)})
    if hidden:
        raise NotImplementedError(
            f"{', '.join(hidden)} of {kind} computes attention by itself, not by one of transformers' attention "
            "functions, through which LookaheadCache sees queries and keys. Generate with DynamicCache for this model."
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
