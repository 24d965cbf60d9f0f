"""Watching the attention of a model while one forward runs, without changing the model.

transformers models look their attention function up by name in ``ALL_ATTENTION_FUNCTIONS`` at every call. While
:func:`observe_attention` is active, that name leads to a function that runs the original and then shows queries and
keys to an observer. The entry is put back afterwards. Other threads, and other models in the same thread, pass
through: the observer belongs to the thread that set it.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lkq_hf.compat import require_parts

Observer = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], None]
"""Called after each attention with (module, query, key, value, keyword arguments of the attention function).

query is ``[batch, heads, queries, head_dim]``, key and value ``[batch, kv_heads, length, head_dim]``; the keyword
arguments hold ``scaling`` and, for models that cap their logits, ``softcap``.
"""

Bias = Callable[[nn.Module, torch.Tensor], torch.Tensor | None]
"""Called before each attention with (module, query); returns what to add to its logits instead of the model's mask,
``[batch, heads, queries, length]``, or None to leave that as it is."""


class _ThreadState(threading.local):
    def __init__(self) -> None:
        # Not defaults of the class, which torch.compile of torch 2.11 reads in the place of what a thread has set.
        self.observer: Observer | None = None
        self.bias: Bias | None = None
        # The last positions of the running forward on which lookahead adapters are active, and its batch and length.
        self.lookahead_length = 0
        self.token_shape = (0, 0)


thread_state = _ThreadState()

DECODE_ATTENTION = "lookahead_decode"
"""What a model's "sdpa" is called while a cache with static shapes is filled (:mod:`lkq_hf.cache.decode`)."""
_SDPA = ("sdpa", DECODE_ATTENTION)

_lock = threading.RLock()
# (registry, attention implementation) -> number of forwards that observe it now, over all threads, and the entry that
# was local to the registry before.
_observed: dict[tuple[int, str], tuple[int, Callable[..., Any] | None]] = {}


def attention_registry(decoder: nn.Module) -> Any:
    """The attention functions that the modelling file of ``decoder`` looks up: the shared ones, or its own."""
    return getattr(sys.modules[type(decoder).__module__], "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)


def _run_original(original: Callable[..., Any] | None, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if original is None:
        # "eager" is not in the registry: every modelling file brings its own.
        original = sys.modules[type(module).__module__].eager_attention_forward
    return original(module, *args, **kwargs)


def _wrap(original: Callable[..., Any] | None) -> Callable[..., Any]:
    def observed_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if thread_state.bias is not None and (bias := thread_state.bias(module, query)) is not None:
            attention_mask = bias
        output = _run_original(original, module, query, key, value, attention_mask, *args, **kwargs)
        # A compiled forward would hold on to one observer. Elsewhere the guard against that would only cost time.
        show = _show_uncompiled if torch.compiler.is_compiling() else _show
        show(module, query, key, value, kwargs)
        return output

    return observed_attention


def _show(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> None:
    if thread_state.observer is not None:
        thread_state.observer(module, query, key, value, options)


_show_uncompiled = torch.compiler.disable(_show)


class _Overrides(dict[str, Callable[..., Any]]):
    """The entries local to a registry, which looks for a key before it reads it: an entry that another thread takes
    out in between is read from the library-wide ones, and not missed."""

    def __init__(self, registry: Any) -> None:
        super().__init__(registry._local_mapping)
        self._library_wide = registry._global_mapping

    def __missing__(self, key: str) -> Callable[..., Any]:
        return self._library_wide[key]


def start_observing(decoder: PreTrainedModel, observer: Observer) -> Callable[[], None]:
    """Shows every attention of ``decoder`` in this thread to ``observer`` until the returned function is called."""
    registry: Any = attention_registry(decoder)
    require_parts(registry, "_local_mapping", "_global_mapping")
    implementations = [decoder.config._attn_implementation]
    if registry is ALL_ATTENTION_FUNCTIONS and implementations[0] in _SDPA:
        # Another thread's decode of the same model may begin or end meanwhile.
        implementations = [*_SDPA]
    with _lock:
        for implementation in implementations:
            _put_in(registry, implementation)
    outer = thread_state.observer
    thread_state.observer = observer

    def stop() -> None:
        thread_state.observer = outer
        with _lock:
            for implementation in implementations:
                _take_out(registry, implementation)

    return stop


def _put_in(registry: Any, implementation: str) -> None:
    identity = (id(registry), implementation)
    if identity in _observed:
        count, previous = _observed[identity]
    else:
        # The mapping local to the registry shadows the library-wide one: taking our entry out restores it.
        if not isinstance(registry._local_mapping, _Overrides):
            registry._local_mapping = _Overrides(registry)
        count, previous = 0, registry._local_mapping.get(implementation)
        registry[implementation] = _wrap(registry.get(implementation))
    _observed[identity] = count + 1, previous


def _take_out(registry: Any, implementation: str) -> None:
    identity = (id(registry), implementation)
    count, previous = _observed[identity]
    if count > 1:
        _observed[identity] = count - 1, previous
        return
    del _observed[identity]
    if previous is None:
        del registry[implementation]
    else:
        registry[implementation] = previous


@contextmanager
def observe_attention(decoder: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Context manager over :func:`start_observing`."""
    stop = start_observing(decoder, observer)
    try:
        yield
    finally:
        stop()


@contextmanager
def bias_attention(decoder: PreTrainedModel, bias: Bias) -> Iterator[None]:
    """Replaces the mask of every attention of ``decoder`` in this thread. Implementations without masks ignore it."""
    outer, thread_state.bias = thread_state.bias, bias
    try:
        with observe_attention(decoder, lambda *_: None):
            yield
    finally:
        thread_state.bias = outer


@contextmanager
def lookahead_positions(length: int, token_shape: tuple[int, int]) -> Iterator[None]:
    """Switches lookahead adapters on for the last ``length`` positions of the forwards run inside (in this thread).

    Args:
        length: positions.
        token_shape: batch size and length of the forwards' inputs.
    """
    outer = thread_state.lookahead_length, thread_state.token_shape
    thread_state.lookahead_length, thread_state.token_shape = length, token_shape
    try:
        yield
    finally:
        thread_state.lookahead_length, thread_state.token_shape = outer
