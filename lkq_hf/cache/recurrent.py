"""Layers with a state of fixed size (recurrences, short convolutions), and those with a state and entries.

The state is bounded, so it stays as it is. What is new here: tokens that are appended to a forward leave no trace in
it, a forward that fails is undone, and the operations on the batch that transformers' own layers lack.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lkq_hf.attention import lookahead_positions, thread_state
from lkq_hf.cache.layers import EvictedLayer, UncompressedSlidingLayer
from lkq_hf.cache.static import StaticEvictedLayer, StaticSlidingLayer

if TYPE_CHECKING:
    from typing import Any as LinearAttentionLayer  # its attributes and those of other layers differ in their types
else:
    from transformers.cache_utils import LinearAttentionLayer

_STATES = ("conv_states", "recurrent_states")


class RecurrentLayer(LinearAttentionLayer):
    """A layer with one or several states of fixed size, ``conv_states`` and ``recurrent_states``."""

    keys: Any = None
    values: Any = None
    _states_before: tuple[dict[str, dict[int, torch.Tensor | None]], dict[int, bool]] | None = None

    def begin_reading(self, appended: int) -> None:
        """Remembers the states, for `abandon_reading`."""
        self._states_before = self._copies(), dict(self.has_previous_state)

    def end_reading(self) -> None:
        self._states_before = None

    def abandon_reading(self) -> None:
        """Goes back to the states before `begin_reading`."""
        if self._states_before is not None:
            copies, self.has_previous_state = self._states_before
            for name, states in copies.items():
                self._replace(name, states)
        self.end_reading()

    def without_trace(self, forward: Callable[[], Any]) -> Any:
        """What ``forward`` returns; the states it leaves are dropped."""
        kept = {name: getattr(self, name) for name in _STATES}, self.has_previous_state
        for name, states in self._copies().items():
            setattr(self, name, states)
        self.has_previous_state = dict(self.has_previous_state)
        try:
            return forward()
        finally:
            for name, states in kept[0].items():
                setattr(self, name, states)
            self.has_previous_state = kept[1]

    def _copies(self) -> dict[str, dict[int, torch.Tensor | None]]:
        return {
            name: {index: None if state is None else state.clone() for index, state in getattr(self, name).items()}
            for name in _STATES
        }

    def _replace(self, name: str, new: dict[int, torch.Tensor | None]) -> None:
        """Changes states, where a compiled decode expects them if their shapes stay."""
        states = getattr(self, name)
        for index, state in new.items():
            if state is None or states[index] is None or states[index].shape != state.shape:
                states[index] = state
            else:
                states[index].copy_(state)

    @property
    def states_nbytes(self) -> int:
        """Bytes of all states."""
        states = (state for name in _STATES for state in getattr(self, name).values())
        return sum(state.nbytes for state in states if state is not None)

    def reset(self) -> None:
        LinearAttentionLayer.__init__(self, self.number_of_states)  # type: ignore[call-arg]

    def croppable(self, tokens_to_remove: int) -> int:
        """How many tokens a ``crop`` removes.

        Raises:
            ValueError: it cannot.
        """
        remove = int(tokens_to_remove)
        if remove == 0:
            return 0
        if any(state is not None for state in self.recurrent_states.values()):
            raise ValueError(
                "cannot remove tokens from a model with recurrent layers: what they have read cannot be taken out of "
                "their state. Start again with a new LookaheadCache, or copy.deepcopy it before what may be removed."
            )
        if remove > 0 or not self.record_past:
            raise ValueError(
                "cannot remove tokens from a model with convolutional layers unless these keep what they read: call "
                "activate_past_recording() on the LookaheadCache before it reads anything, and crop(-tokens) after "
                "each forward."
            )
        return -remove

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; see `croppable`.

        Raises:
            ValueError: the state cannot go back.
        """
        self.croppable(tokens_to_remove)
        if self.record_past and any(state is not None for state in self.conv_states.values()):
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take_states(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take_states(lambda state: state[indices.to(state.device)])

    def _take_states(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in _STATES:
            states = getattr(self, name)
            self._replace(name, {index: choose(state) for index, state in states.items() if state is not None})


class _MixedLayer(RecurrentLayer):
    """A layer with states, and with entries as another kind of layer has them.

    Args:
        number_of_states: of the first.
        *arguments: of the second.
    """

    kind: ClassVar[Any]

    def __init__(self, number_of_states: int, *arguments: Any) -> None:
        self.kind.__init__(self, *arguments)
        LinearAttentionLayer.__init__(self, number_of_states)  # type: ignore[call-arg]
        self._mixed_arguments = number_of_states, *arguments

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        (self.kind if args else RecurrentLayer).lazy_initialization(self, *args, **kwargs)

    def begin_reading(self, appended: int) -> None:
        RecurrentLayer.begin_reading(self, appended)
        self.kind.begin_reading(self, appended)

    def end_reading(self) -> None:
        RecurrentLayer.end_reading(self)
        self.kind.end_reading(self)

    def abandon_reading(self) -> None:
        RecurrentLayer.abandon_reading(self)
        self.kind.abandon_reading(self)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def croppable(self, tokens_to_remove: int) -> int:
        RecurrentLayer.croppable(self, tokens_to_remove)
        return self.kind.croppable(self, tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        self.croppable(tokens_to_remove)
        RecurrentLayer.crop(self, tokens_to_remove)
        self.kind.crop(self, tokens_to_remove)

    def get_max_length(self) -> int:
        return self.kind.get_max_length(self)

    def reset(self) -> None:
        self.__init__(*self._mixed_arguments)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        RecurrentLayer.reorder_cache(self, beam_idx)
        self.kind.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        RecurrentLayer.batch_repeat_interleave(self, repeats)
        self.kind.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        RecurrentLayer.batch_select_indices(self, indices)
        self.kind.batch_select_indices(self, indices)


class MixedLayer(_MixedLayer, EvictedLayer):
    """States, and entries that are evicted."""

    kind = EvictedLayer


class MixedSlidingLayer(_MixedLayer, UncompressedSlidingLayer):
    """States, and a sliding window."""

    kind = UncompressedSlidingLayer


class StaticMixedLayer(_MixedLayer, StaticEvictedLayer):
    """A `MixedLayer` with static shapes after the prefill."""

    kind = StaticEvictedLayer


class StaticMixedSlidingLayer(_MixedLayer, StaticSlidingLayer):
    """A `MixedSlidingLayer` with static shapes after the prefill."""

    kind = StaticSlidingLayer


def read_apart(
    layer: RecurrentLayer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], appended: int
) -> Any:
    """What a recurrent module returns for tokens of the text and tokens that are appended to it for one forward.

    The module reads the text, and then, from the states that this leaves, the appended tokens. It is called twice, so
    that what it returns of the text is the same to the last bit as without them.

    Args:
        layer: the module's layer of the cache.
        forward: of the module.
        args, kwargs: what it is called with, over ``[batch, length + appended]``.
        appended: the last positions.

    Raises:
        NotImplementedError: the module reads something else than hidden states.
    """
    total = _inputs(args, kwargs).shape[1]
    length = total - appended
    text = _part(forward, args, kwargs, 0, length, total) if length else None
    rest = layer.without_trace(lambda: _part(forward, args, kwargs, length, total, total))
    return rest if text is None else _join(text, rest)


def read_one_by_one(layer: RecurrentLayer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a module returns that goes on from its state only with one token at a time."""
    total = _inputs(args, kwargs).shape[1]
    if total == 1 or not any(layer.has_previous_state.values()):
        return forward(*args, **kwargs)
    whole = _part(forward, args, kwargs, 0, 1, total)
    for place in range(1, total):
        whole = _join(whole, _part(forward, args, kwargs, place, place + 1, total))
    return whole


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states ``[batch, length, hidden]`` that a module is called with.

    Raises:
        NotImplementedError: there are none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim == 3:
            return value
    raise NotImplementedError(
        "a recurrent module of this model reads token ids, which appended tokens do not have. Choose a scorer without "
        'them, such as "snapkv".'
    )


def _part(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], begin: int, end: int, total: int
) -> Any:
    """What the module returns for these of ``total`` positions; the adapter's are still the last of all."""
    adapted = max(end - max(begin, total - thread_state.lookahead_length), 0)
    part_args, part_kwargs = _cut((args, kwargs), total, begin, end)
    with lookahead_positions(adapted, (thread_state.token_shape[0], end - begin)):
        return forward(*part_args, **part_kwargs)


def _cut(value: Any, total: int, begin: int, end: int) -> Any:
    """Positions of everything with ``total`` of them, ``[batch, total, ...]`` or ``[..., total]``."""
    if isinstance(value, torch.Tensor):
        if value.ndim > 1 and value.shape[1] == total:
            return value[:, begin:end]
        return value[..., begin:end] if value.ndim > 1 and value.shape[-1] == total else value
    if isinstance(value, tuple | list):
        return type(value)(_cut(element, total, begin, end) for element in value)
    if type(value) is dict:
        return {name: _cut(element, total, begin, end) for name, element in value.items()}
    return value


def _join(text: Any, rest: Any) -> Any:
    if isinstance(text, tuple):
        return tuple(_join(*pair) for pair in zip(text, rest, strict=True))
    return torch.cat([text, rest], dim=1) if isinstance(text, torch.Tensor) else text
