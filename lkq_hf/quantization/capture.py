"""What reaches a block and the layers inside it, learnt by watching the real model run."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lkq_hf.quantization.experts import is_experts

PROBE_TOKENS = 8
# Part of a disturbance that rounding may swallow on its way into a sum.
SUM_TOLERANCE = 0.02


class Stop(Exception):
    """Ends a forward pass once everything that is wanted from it has been seen."""


@dataclass(frozen=True)
class Placeholder:
    """Stands for what a passed-over block would have returned at one place behind its hidden states.

    A model hands it on to the next block as it is; whatever else it does with it is an error.
    """

    place: int


Extras: TypeAlias = tuple[Any, ...]
"""What a block returns after its hidden states."""


def sequence_of(kind: Any, hidden: Tensor, extras: Iterable[Any]) -> Any:
    """A tuple, list or named tuple of a block's hidden states and what follows them."""
    return getattr(kind, "_make", kind)((hidden, *extras))


@dataclass
class BlockCall:
    """How the model calls one block, apart from the hidden states: its other arguments, one set a batch.

    Some of them may be what the block before returned besides its hidden states; placeholders stand for these.
    `returns` tells in which sequence the block returns its hidden states and how many items follow them; it is `None`
    where the block returns hidden states alone.
    """

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    returns: tuple[type, int] | None = None

    def with_extras(self, extras: Sequence[Extras]) -> "BlockCall":
        """This call with what the block before returned, batch by batch, in the place of the placeholders."""
        if not self.takes_extras:
            return self
        filled = [_filled(arguments, each) for arguments, each in zip(self.arguments, extras, strict=True)]
        return BlockCall(filled, self.returns)

    @property
    def takes_extras(self) -> bool:
        """Whether some of the arguments are what the block before returned besides its hidden states."""
        return _has_placeholder(self.arguments)

    def on(self, device: torch.device) -> "BlockCall":
        """This call with what all batches share with the first one on a device, once."""
        first = move(self.arguments[0], device)
        shared = [first if self.same_arguments(0, batch) else each for batch, each in enumerate(self.arguments)]
        return BlockCall(shared, self.returns)

    def same_arguments(self, batch: int, other: int) -> bool:
        """Whether two batches have the same arguments, and the same tensors in them."""
        return _same(self.arguments[batch], self.arguments[other])

    def returned(self, hidden: Tensor) -> Any:
        """What the block would return with these hidden states, with placeholders for what follows them."""
        if self.returns is None:
            return hidden
        sequence, extras = self.returns
        return sequence_of(sequence, hidden, map(Placeholder, range(extras)))

    def run(self, block: Callable[..., Any], hidden: Tensor, batch: int) -> Tensor:
        """The block's hidden states for one batch, `[batch, length, hidden]`."""
        return self.results(block, hidden, batch)[0]

    def results(self, block: Callable[..., Any], hidden: Tensor, batch: int) -> tuple[Tensor, Extras]:
        """The block's hidden states for one batch, and what else it returns, in main memory."""
        args, kwargs = move(self.arguments[batch], hidden.device)
        output = block(hidden, *args, **kwargs)
        if not isinstance(output, tuple | list):
            return output, ()
        return output[0], move(tuple(output[1:]), torch.device("cpu"))


def _filled(value: Any, extras: Extras) -> Any:
    """Nested arguments with extras in the place of their placeholders."""
    if isinstance(value, Placeholder):
        return extras[value.place]
    if isinstance(value, tuple | list):
        return type(value)(_filled(item, extras) for item in value)
    if isinstance(value, dict):
        return {key: _filled(item, extras) for key, item in value.items()}
    return value


def _has_placeholder(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_placeholder, value))
    if isinstance(value, dict):
        return any(map(_has_placeholder, value.values()))
    return isinstance(value, Placeholder)


def move(value: Any, device: torch.device) -> Any:
    """Nested arguments with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(move(item, device) for item in value)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    return value


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, tuple | list) and isinstance(other, tuple | list):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_same(item, other[key]) for key, item in value.items())
    return value is other or (isinstance(value, int | float | str) and bool(value == other))


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


def capture_block_calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[BlockCall]]:
    """Runs the model's own forward over token batches with every block passed over.

    The model prepares masks, rotary embeddings and whatever else each block is given, per layer type where it has
    several; a passed-over block returns its input, so the pass costs next to nothing and needs no block's weights.
    Only one real call per class of blocks is made, on a few tokens, to see what it returns besides hidden states.
    Nothing is known about the model beyond that a block's first argument and result are the hidden states.

    Returns:
        The first block's hidden states, `[batch, length, hidden]` per batch, and one `BlockCall` per block.

    Raises:
        ValueError: the model does not run to its last block, or computes with what a block returns besides its hidden
            states.
    """
    results: dict[type, Any] = {}
    _pass_over(model, blocks, [_few(batches[0])], results, probing=True)
    return _pass_over(model, blocks, batches, results, probing=False)


def probe_block_calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor
) -> tuple[Tensor, list[BlockCall]]:
    """The same for a few tokens of `tokens`: the first block's hidden states, and calls that can be made at once.

    What a block takes of the one before, besides hidden states, is here what the first block of its class returned.
    """
    hidden, calls = _pass_over(model, blocks, [_few(tokens)], {}, probing=True)
    return hidden[0], calls


def _few(tokens: Tensor) -> Tensor:
    return tokens[:1, :PROBE_TOKENS]


@torch.no_grad()
def _pass_over(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Sequence[Tensor],
    results: dict[type, Any],
    probing: bool,
) -> tuple[list[Tensor], list[BlockCall]]:
    """`capture_block_calls` with one real call for each class that is not in `results`, which the result joins.

    Args:
        probing: whether a passed-over block returns what the real call did besides hidden states, or placeholders.
    """
    calls = [BlockCall() for _ in blocks]
    hidden_states: list[Tensor] = []

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
            if type(block) not in results:
                results[type(block)] = forward(hidden, *args, **kwargs)
            result = results[type(block)]
            several = isinstance(result, tuple | list)
            call.returns = (type(result), len(result) - 1) if several else None
            if index == len(blocks) - 1:
                raise Stop
            if several and probing:
                return sequence_of(type(result), hidden, result[1:])
            return call.returned(hidden)

        return recorded

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, pass_over(index, block, block.forward)))
        for batch in batches:
            _run_to_last_block(model, batch)
    return hidden_states, calls


def _run_to_last_block(model: PreTrainedModel, input_ids: Tensor) -> None:
    try:
        model(input_ids=input_ids, use_cache=False)
    except Stop:
        return
    except (TypeError, AttributeError) as error:
        if Placeholder.__name__ in str(error):
            raise ValueError(
                "the model computes with what its blocks return besides hidden states, so they cannot be calibrated "
                f"one by one ({error})"
            ) from error
        raise
    raise ValueError(
        "the model's forward did not reach its last block; name the list of blocks with block_name_to_quantize"
    )


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
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
    """Layers of a block that receive the same tensor: they share their input moments and are solved together.

    `added_at` tells where their output is first seen as a part of a sum, if that is known (`find_sum`).
    """

    names: tuple[str, ...]
    called_once: bool
    added_at: str | None = None


@torch.no_grad()
def observe_order(block: nn.Module, names: Sequence[str], call: BlockCall, hidden: Tensor) -> list[InputGroup]:
    """Groups layers by the input they see and orders the groups by when they run, from one real forward pass.

    Fused experts are a group of their own. Layers that did not run (single experts without a token) come last, each on
    its own.

    Args:
        names: the layers and fused experts, as names inside the block.
        hidden: one batch, `[batch, length, hidden]`.
    """
    seen: list[tuple[str, Tensor, Any]] = []

    def watch(name: str) -> Any:
        alone = is_experts(block.get_submodule(name))

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The tensor itself is kept: its address identifies it only while it lives.
            x = args[0] if args else next(iter(kwargs.values()))
            shared = x.numel() and not alone
            identity = (x.data_ptr(), x.shape, x.stride(), x._version) if shared else object()
            seen.append((name, x, identity))

        return hook

    with ExitStack() as stack:
        for name in names:
            layer = block.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        call.run(block, hidden, 0)

    times = {name: sum(other == name for other, _, _ in seen) for name in names}
    groups: dict[Any, list[str]] = {}
    for name, _, identity in seen:
        if not any(name in members for members in groups.values()):
            groups.setdefault(identity, []).append(name)
    ordered = [InputGroup(tuple(members), all(times[name] == 1 for name in members)) for members in groups.values()]
    return ordered + [InputGroup((name,), False) for name in names if not times[name]]


@torch.no_grad()
def find_sum(block: nn.Module, name: str, call: BlockCall, hidden: Tensor) -> str | None:
    """Where a layer's output has been added to something else, as it is to the residual stream.

    The block runs twice, the second time with the layer's output disturbed; what differs by just that is a sum.

    Args:
        name: the layer, as a name inside the block.
        hidden: one batch, `[batch, length, hidden]`.

    Returns:
        The name of the first module that receives the sum, `""` if it is the block's output, or `None` where no sum is
        seen: the output is used otherwise, or normalized before it is added.
    """
    layer = block.get_submodule(name)
    own: list[Tensor] = []

    def run(noise: Tensor | None = None) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        own.clear()

        def disturbed(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            own.append(output)
            return output if noise is None else output + noise

        def watch(other: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                # Only what may be the sum is kept, so that this needs less memory than the block itself.
                if own and args and isinstance(args[0], Tensor) and args[0].numel() == own[0].numel():
                    inputs.setdefault(other, args[0].flatten(0, -2).clone())

            return hook

        with ExitStack() as stack:
            stack.callback(layer.register_forward_hook(disturbed).remove)
            for other, module in block.named_modules():
                if module is not layer and module is not block:
                    stack.callback(module.register_forward_pre_hook(watch(other)).remove)
            output = call.run(block, hidden, 0)
        return {**inputs, "": output.flatten(0, -2)}

    plain = run()
    stream = hidden.flatten(0, -2).shape
    if not own or own[0].flatten(0, -2).shape != stream:
        return None
    output = own[0]
    # Large beside the sum, so that in half precision too the sum shows all of it.
    noise = output.flip(-1) * (16 * hidden.abs().max() / output.abs().max().clamp(min=1e-6))
    moved = run(noise)
    wanted = noise.flatten(0, -2)
    for other, value in plain.items():
        after = moved.get(other)
        if value.shape != stream or after is None or after.shape != stream:
            continue
        if torch.equal(value, output.flatten(0, -2)):
            continue
        if (after - value - wanted).float().norm() < SUM_TOLERANCE * wanted.float().norm():
            return other
    return None


@torch.no_grad()
def layer_inputs(
    block: nn.Module, groups: Sequence[InputGroup], call: BlockCall, hidden: Tensor, batch: int
) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    """What each group's first layer receives in one forward pass, and what its output becomes part of.

    The pass ends as soon as all has been seen, where every layer runs once.

    Returns:
        For each group its inputs, and the sum at its `added_at`.
    """
    found: list[list[Tensor]] = [[] for _ in groups]
    sums: list[Tensor | None] = [None] * len(groups)

    def stop_if_done() -> None:
        complete = all(total is not None or group.added_at is None for total, group in zip(sums, groups, strict=True))
        if complete and all(group.called_once for group in groups) and all(found):
            raise Stop

    def watch_input(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            found[index].append(args[0])
            stop_if_done()

        return hook

    def watch_sum(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if found[index] and sums[index] is None:
                sums[index] = args[0]
                stop_if_done()

        return hook

    with ExitStack() as stack:
        for index, group in enumerate(groups):
            stack.callback(block.get_submodule(group.names[0]).register_forward_pre_hook(watch_input(index)).remove)
            if group.added_at:
                stack.callback(block.get_submodule(group.added_at).register_forward_pre_hook(watch_sum(index)).remove)
        with suppress(Stop):
            output = call.run(block, hidden, batch)
            sums = [output if group.added_at == "" else total for total, group in zip(sums, groups, strict=True)]
    return found, sums
