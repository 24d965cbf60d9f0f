"""Taking part in the attention of a model while one forward runs, without changing the model.

transformers models look their attention function up by the name in their config. `start_attending` names one
that is registered here by transformers' own `AttentionInterface`; it runs the original, and what
the thread that called has asked for around it. The name is put back afterwards. Other threads, and other models in
the same thread, pass through to the original.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "lookahead|"
"""What is put before the name of an attention implementation to go through this file."""


@dataclass
class AttentionCall:
    """One call of a model's attention function.

    Attributes:
        module: the attention module; its ``layer_idx`` says which layer of the cache it fills.
        implementation: the name of the original function, such as "sdpa".
        query: ``[batch, heads, queries, head_dim]``.
        key, value: ``[batch, kv_heads, length, head_dim]``, as the cache returned them.
        mask: what the model made for this implementation.
        options: the other arguments by name, such as ``scaling``, ``dropout`` and ``softcap``.
    """

    module: nn.Module
    implementation: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    options: dict[str, Any]

    @property
    def scaling(self) -> float:
        """Factor on the dot products."""
        scaling = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    def run(self) -> Any:
        """What the original returns."""
        original = _original(self.module, self.implementation)
        return original(self.module, self.query, self.key, self.value, self.mask, **self.options)


Attend = Callable[[AttentionCall], Any]
"""Called in the place of each attention; returns what it should return."""

Recur = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called in the place of the forward of each module with a recurrent state: (module, forward, args, kwargs)."""

Observer = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], None]
"""Called after each attention with (module, query, key, value, keyword arguments of the attention function).

query is ``[batch, heads, queries, head_dim]``, key and value ``[batch, kv_heads, length, head_dim]``; the keyword
arguments hold ``scaling`` and, for models that cap their logits, ``softcap``, for those with sinks ``s_aux``.
"""

Bias = Callable[[nn.Module, torch.Tensor], torch.Tensor | None]
"""Called before each attention with (module, query); returns what to add to its logits instead of the model's mask,
``[batch, heads, queries, length]``, or None to leave that as it is."""


class _ThreadState(threading.local):
    """What this thread has asked for. Set per instance: torch.compile of torch 2.11 reads defaults of the class."""

    def __init__(self) -> None:
        self.attend: Attend | None = None
        # Whether `attend` may become part of a compiled graph. Others are called outside of it, anew each time.
        self.attend_compiles = False
        self.recur: Recur | None = None
        # The last positions of the running forward on which lookahead adapters are active, and its batch and length.
        self.lookahead_length = 0
        self.token_shape = (0, 0)


thread_state = _ThreadState()


def _original(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The attention function that ``module`` would call by this name: a shared one, or one of its modeling file."""
    file = sys.modules[type(module).__module__]
    if implementation == "eager":
        return file.eager_attention_forward
    registry = getattr(file, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function: Callable[..., Any] = registry[implementation]
    if "flash" in implementation:
        return lambda module, *args, **options: function(_Named(module, implementation), *args, **options)
    return function


class _Named:
    """A module whose config names another attention implementation: flash attention loads its kernel by that name."""

    def __init__(self, module: Any, implementation: str) -> None:
        self._module = module
        self._implementation = implementation

    def __getattr__(self, name: str) -> Any:
        if name == "config":
            return _Named(self._module.config, self._implementation)
        if name == "_attn_implementation":
            return self._implementation
        return getattr(self._module, name)


_registered: set[str] = set()


def _register(implementation: str) -> str:
    """The name by which ``implementation`` goes through this file, registered with transformers."""
    name = PREFIX + implementation
    if name not in _registered:

        def attention_forward(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: Any,
            **options: Any,
        ) -> Any:
            call = AttentionCall(module, implementation, query, key, value, attention_mask, options)
            attend = thread_state.attend
            if attend is None:
                return call.run()
            if torch.compiler.is_compiling() and not thread_state.attend_compiles:
                return _attend_uncompiled(call)
            return attend(call)

        AttentionInterface.register(name, attention_forward)
        mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
        if mask is not None:
            AttentionMaskInterface.register(name, mask)
        _registered.add(name)
    return name


@torch.compiler.disable
def _attend_uncompiled(call: AttentionCall) -> Any:
    # A compiled forward would hold on to what one thread asked for once.
    return call.run() if thread_state.attend is None else thread_state.attend(call)


for _implementation in ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"):
    _register(_implementation)

_lock = threading.RLock()
# id of a config -> how many forwards go through this file now, over all threads, and the name to put back.
_renamed: dict[int, tuple[int, str]] = {}
_configs: "weakref.WeakKeyDictionary[nn.Module, list[Any]]" = weakref.WeakKeyDictionary()


def implementation_of(config: Any) -> str:
    """The attention implementation that ``config`` names, also while a forward goes through this file."""
    name: str = config._attn_implementation
    return name.removeprefix(PREFIX)


def _configs_of(decoder: nn.Module) -> list[Any]:
    """The configs in which the attention modules of ``decoder`` look up the name."""
    if decoder not in _configs:
        modules = [decoder, *(module for module in decoder.modules() if hasattr(module, "layer_idx"))]
        found = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
        _configs[decoder] = [config for config in found.values() if hasattr(config, "_attn_implementation")]
    return _configs[decoder]


def start_attending(decoder: PreTrainedModel, attend: Attend, compiles: bool = False) -> Callable[[], None]:
    """Calls ``attend`` for every attention of ``decoder`` in this thread until the returned function is called.

    Args:
        decoder: the stack of layers.
        attend: what is called.
        compiles: whether it may become part of a compiled graph.
    """
    configs = _configs_of(decoder)
    with _lock:
        for config in configs:
            count, name = _renamed.get(id(config), (0, config._attn_implementation))
            if count == 0:
                config._attn_implementation = _register(name)
            _renamed[id(config)] = count + 1, name
    outer = thread_state.attend, thread_state.attend_compiles
    thread_state.attend, thread_state.attend_compiles = attend, compiles

    def stop() -> None:
        thread_state.attend, thread_state.attend_compiles = outer
        with _lock:
            for config in configs:
                count, name = _renamed.pop(id(config))
                if count > 1:
                    _renamed[id(config)] = count - 1, name
                elif config._attn_implementation == PREFIX + name:  # nobody has chosen another meanwhile
                    config._attn_implementation = name

    return stop


@contextmanager
def attending(decoder: PreTrainedModel, attend: Attend, compiles: bool = False) -> Iterator[None]:
    """Context manager over `start_attending`."""
    stop = start_attending(decoder, attend, compiles)
    try:
        yield
    finally:
        stop()


@contextmanager
def observe_attention(decoder: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Shows every attention of ``decoder`` in this thread to ``observer``, after it has run."""
    outer = thread_state.attend

    def attend(call: AttentionCall) -> Any:
        output = call.run() if outer is None else outer(call)
        observer(call.module, call.query, call.key, call.value, call.options)
        return output

    with attending(decoder, attend):
        yield


@contextmanager
def bias_attention(decoder: PreTrainedModel, bias: Bias) -> Iterator[None]:
    """Replaces the mask of every attention of ``decoder`` in this thread. Implementations without masks ignore it."""

    def attend(call: AttentionCall) -> Any:
        found = bias(call.module, call.query)
        if found is not None:
            call.mask = found
        return call.run()

    with attending(decoder, attend):
        yield


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
