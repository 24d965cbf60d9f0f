"""What reaches a block and the layers inside it, learnt by watching the real model run."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PROBE_TOKENS = 8


class Stop(Exception):
    """Ends a forward pass once everything that is wanted from it has been seen."""


@dataclass
class BlockCall:
    """How the model calls one block, apart from the hidden states: its other arguments, one set a batch."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    returns_tuple: bool = False

    def run(self, block: nn.Module, hidden: Tensor, batch: int) -> Tensor:
        """The block's hidden states for one batch, `[batch, length, hidden]`."""
        args, kwargs = move(self.arguments[batch], hidden.device)
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def move(value: Any, device: torch.device) -> Any:
    """Nested arguments with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(move(item, device) for item in value)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    return value


def _share(value: Any, like: Any) -> Any:
    """`value`, with every tensor that equals its counterpart in `like` replaced by it.

    Batches of one length have the same masks and rotary embeddings; kept once they cost nothing.
    """
    if isinstance(value, Tensor):
        same = isinstance(like, Tensor) and value.dtype == like.dtype and value.shape == like.shape
        return like if same and (value is like or torch.equal(value, like)) else value
    if isinstance(value, tuple | list):
        same = isinstance(like, tuple | list) and len(like) == len(value)
        return type(value)(_share(item, like[i] if same else None) for i, item in enumerate(value))
    if isinstance(value, dict):
        known = like if isinstance(like, dict) else {}
        return {key: _share(item, known.get(key)) for key, item in value.items()}
    return value


@torch.no_grad()
def capture_block_calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[BlockCall]]:
    """Runs the model's own forward over token batches with every block passed over.

    The model prepares masks, rotary embeddings and whatever else each block is given, per layer type where it has
    several; a passed-over block returns its input, so the pass costs next to nothing and needs no block's weights.
    Only one real call per class of blocks is made, on a few tokens, to see whether it returns a tensor or a tuple.
    Nothing is known about the model beyond that a block's first argument and result are the hidden states.

    Returns:
        The first block's hidden states, `[batch, length, hidden]` per batch, and one `BlockCall` per block.
    """
    calls = [BlockCall() for _ in blocks]
    hidden_states: list[Tensor] = []
    returns_tuple: dict[type, bool] = {}

    def pass_over(index: int, block: nn.Module, forward: Any) -> Any:
        name = next(iter(inspect.signature(forward).parameters))

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop(name)
            if index == 0:
                hidden_states.append(hidden)
            call = calls[index]
            if index > 0:
                previous: Any = calls[index - 1].arguments[len(call.arguments)]
            else:
                previous = None
            arguments = _share((args, kwargs), previous)
            call.arguments.append(_share(arguments, call.arguments[0] if call.arguments else None))
            if type(block) not in returns_tuple:
                returns_tuple[type(block)] = isinstance(forward(hidden, *args, **kwargs), tuple)
            call.returns_tuple = returns_tuple[type(block)]
            if index == len(blocks) - 1:
                raise Stop
            return (hidden,) if call.returns_tuple else hidden

        return recorded

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(_replaced_forward(block, pass_over(index, block, block.forward)))
        # A few tokens first, for the real calls; what they leave behind is not wanted.
        _run_to_last_block(model, batches[0][:1, :PROBE_TOKENS])
        hidden_states.clear()
        for call in calls:
            call.arguments.clear()
        for batch in batches:
            _run_to_last_block(model, batch)
    return hidden_states, calls


def _run_to_last_block(model: PreTrainedModel, input_ids: Tensor) -> None:
    try:
        model(input_ids=input_ids, use_cache=False)
    except Stop:
        return
    raise ValueError(
        "the model's forward did not reach its last block; name the list of blocks with block_name_to_quantize"
    )


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    # On the instance: its class, which other models share, stays untouched.
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@dataclass(frozen=True)
class InputGroup:
    """Layers of a block that receive the same tensor: they share their input moments and are solved together."""

    names: tuple[str, ...]
    called_once: bool


@torch.no_grad()
def observe_order(block: nn.Module, names: Sequence[str], call: BlockCall, hidden: Tensor) -> list[InputGroup]:
    """Groups layers by the input they see and orders the groups by when they run, from one real forward pass.

    Layers that did not run (experts without a token) come last, each on its own.

    Args:
        names: the layers, as names inside the block.
        hidden: one batch, `[batch, length, hidden]`.
    """
    seen: list[tuple[str, Tensor, Any]] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            # The tensor itself is kept: its address identifies it only while it lives.
            x = args[0]
            identity = (x.data_ptr(), x.shape, x.stride(), x._version) if x.numel() else object()
            seen.append((name, x, identity))

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(block.get_submodule(name).register_forward_pre_hook(watch(name)).remove)
        call.run(block, hidden, 0)

    times = {name: sum(other == name for other, _, _ in seen) for name in names}
    groups: dict[Any, list[str]] = {}
    for name, _, identity in seen:
        if not any(name in members for members in groups.values()):
            groups.setdefault(identity, []).append(name)
    ordered = [InputGroup(tuple(members), all(times[name] == 1 for name in members)) for members in groups.values()]
    return ordered + [InputGroup((name,), False) for name in names if not times[name]]


@torch.no_grad()
def layer_inputs(
    block: nn.Module, groups: Sequence[InputGroup], call: BlockCall, hidden: Tensor, batch: int
) -> list[list[Tensor]]:
    """The inputs that each group's first layer receives in one forward pass, one list per group.

    The pass ends as soon as all of them have been seen, where every layer runs once.
    """
    found: list[list[Tensor]] = [[] for _ in groups]
    stop_early = all(group.called_once for group in groups)

    def watch(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            found[index].append(args[0])
            if stop_early and all(found):
                raise Stop

        return hook

    with ExitStack() as stack:
        for index, group in enumerate(groups):
            stack.callback(block.get_submodule(group.names[0]).register_forward_pre_hook(watch(index)).remove)
        with suppress(Stop):
            call.run(block, hidden, batch)
    return found
