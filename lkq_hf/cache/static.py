"""Layers with static shapes, for a decode that is compiled once and replayed as a CUDA graph.

When a prompt has been read, its tail lies at the front of tensors with room for the tokens to come. From then on
nothing moves: a new entry is written into the next slot, and how many slots are filled is a number on the device,
which a graph can read and raise. The slot of a token is its position less a constant, ``offset``, since whatever was
dropped was dropped before; so transformers' own masks (causal, padding, sliding window), which get that offset, also
hide the slots that nothing was written to yet. A later eviction empties the slots and writes the new prefix where the
old one lay.

A sliding-window layer is laid out in the same way, its window followed by room for the new tokens: a few entries
more than a ring would need, but neither a rotation in each step nor a counter that the graph would have to know.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lkq_hf.cache.layers import EvictedLayer, LastQueries, UncompressedSlidingLayer, tokens_removed
from lkq_hf.cache.prefix import Prefix

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicLayer as _Layer
else:
    _Layer = object

SLOTS_MULTIPLE = 64  # fewer distinct sizes to compile for, and rows that attention kernels like
LEAST_GROWTH = 256  # slots; to compile again costs more than they do

MASKED_ATTENTION = ("eager", "sdpa")
"""Attention implementations that take a mask with one value for each slot."""


class StaticStorage(_Layer):
    """Mixed into a dynamic layer, whose own behavior ends with the forward that reads the prompt.

    Args:
        room: tokens to lay out room for, beyond what the prompt leaves.
        *args: those of the dynamic layer.

    Attributes:
        keys, values: ``[batch, kv_heads, slots, head_dim]`` once the prompt is stored; slots not yet written are zero.
    """

    is_compileable = True
    keys: torch.Tensor
    values: torch.Tensor
    _filled: torch.Tensor  # slots written, a scalar on the device of the keys
    _offset: torch.Tensor  # position of the token in slot 0, the same; the host knows it as `_first`

    def __init__(self, room: int, *args: int) -> None:
        super().__init__(*args)
        self._room, self._arguments = room, args
        # Whether the prompt has been stored, so that shapes and addresses do not change any more.
        self.has_static_storage = False
        self._first = 0

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes entries into the next slots, and returns all slots."""
        count = key.shape[-2]
        slots = torch.arange(count, device=self._filled.device) + self._filled
        self._filled.add_(count)
        self.keys.index_copy_(2, slots, key)
        self.values.index_copy_(2, slots, value)
        return self.keys, self.values

    @torch.compiler.disable  # storage made by a graph would be overwritten by its next replay
    def _lay_out(self) -> None:
        """Moves what the prompt left into static storage."""
        stored = self.keys.shape[-2]
        self._first = int(super().get_seq_length()) - stored
        # No wait for the device, unlike torch.tensor.
        self._filled = torch.full((), stored, device=self.keys.device)
        self._offset = torch.full((), self._first, device=self.keys.device)
        torch._dynamo.mark_static_address(self._filled)
        torch._dynamo.mark_static_address(self._offset)
        self._allocate(self.keys, self.values, stored + self._room)
        self.has_static_storage = True

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor, slots: int) -> None:
        """New storage of at least ``slots`` slots that begins with these entries."""
        slots = -(-slots // SLOTS_MULTIPLE) * SLOTS_MULTIPLE
        for name, entries in (("keys", keys), ("values", values)):
            # Zeros, not garbage: a masked slot still takes part, with weight 0, and 0 times NaN is NaN.
            storage = entries.new_zeros(*entries.shape[:2], slots, entries.shape[-1])
            storage[:, :, : entries.shape[-2]] = entries
            torch._dynamo.mark_static_address(storage)
            setattr(self, name, storage)

    @property
    def filled(self) -> torch.Tensor:
        """Slots that are written, a scalar on the device."""
        return self._filled

    @property
    def offset(self) -> torch.Tensor:
        """Position of the token in the first slot, a scalar on the device."""
        return self._offset

    def free_slots(self) -> int:
        """How many tokens still fit. Waits for the device."""
        return self.keys.shape[-2] - int(self._filled)

    def grow(self, tokens: int) -> None:
        """At least doubles the storage, so that ``tokens`` more fit; a compiled decode is then compiled again.

        Drops what has left a sliding window.
        """
        filled = int(self._filled)
        first = self._first_needed_slot(filled)
        slots = max(2 * self.keys.shape[-2], filled - first + max(tokens, LEAST_GROWTH))
        self._allocate(self.keys[:, :, first:filled], self.values[:, :, first:filled], slots)
        self._first += first
        self._offset.fill_(self._first)
        self._filled.fill_(filled - first)

    def _first_needed_slot(self, filled: int) -> int:
        return 0

    def _first_croppable_length(self) -> int:
        """Length of the text before which the cache cannot go back."""
        raise NotImplementedError

    def get_seq_length(self) -> Any:
        """Logical length; after the prompt a scalar tensor, as a number would be a constant of the compiled graph."""
        return self._filled + self._offset if self.has_static_storage else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.has_static_storage:
            return super().get_mask_sizes(query_length)
        return self.keys.shape[-2], self._first

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; see `EvictedLayer.crop`.

        Raises:
            ValueError: entries that the shorter text needs are gone.
        """
        if not self.has_static_storage:
            return super().crop(tokens_to_remove)
        remove = self.croppable(tokens_to_remove)
        self._filled.sub_(remove)
        self.forget_last(remove)
        return None

    def forget_last(self, count: int) -> None:
        """Drops what a layer keeps of the last ``count`` tokens beside their entries."""

    def croppable(self, tokens_to_remove: int) -> int:
        """How many tokens a `crop` removes.

        Raises:
            ValueError: it cannot.
        """
        if not self.has_static_storage:
            return super().croppable(tokens_to_remove)  # type: ignore[misc]
        seen = int(self.get_seq_length())
        remove = tokens_removed(seen, tokens_to_remove)
        if seen - remove < self._first_croppable_length():
            raise ValueError(
                f"cannot remove {remove} of {seen} tokens: entries that the first {self._first_croppable_length()} "
                "tokens need were dropped, so the cache cannot go back before them. Start again with a new "
                "LookaheadCache."
            )
        return remove

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        keys, values = self.keys, self.values
        super().reorder_cache(beam_idx)
        if self.has_static_storage:
            # Back to where a compiled decode expects them.
            self.keys, self.values = keys.copy_(self.keys), values.copy_(self.values)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._mark_storage()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._mark_storage()

    def _mark_storage(self) -> None:
        torch._dynamo.mark_static_address(self.keys)
        torch._dynamo.mark_static_address(self.values)

    def reset(self) -> None:
        self.__init__(self._room, *self._arguments)  # type: ignore[misc]


class StaticEvictedLayer(StaticStorage, EvictedLayer):
    """An `EvictedLayer` whose tail and prefix have static shapes after the prefill."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_reading:
            return super().update(key_states, value_states)
        if self.has_static_storage:
            return self.append(key_states, value_states)
        returned = super().update(key_states, value_states)
        self._lay_out()
        return returned

    def stored_tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.has_static_storage:
            return super().stored_tail()
        filled = int(self._filled)
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def restore(
        self,
        prefix: Prefix | None,
        tail: tuple[torch.Tensor, torch.Tensor],
        parked: Sequence[tuple[torch.Tensor, torch.Tensor]],
        last_queries: LastQueries | None,
    ) -> None:
        length = tail[0].shape[2]
        super().restore(prefix, (tail[0][:, :, :0], tail[1][:, :, :0]), parked, last_queries)
        if length:
            if self.has_static_storage and length > self.free_slots():
                self.grow(length)
            self.update(*tail)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            StaticStorage.append(self, key, value)
            if self.has_static_storage
            else EvictedLayer.append(self, key, value)
        )

    def drop_first(self, count: int) -> None:
        """Says on the device that the tokens behind the first ``count`` slots have moved to the front.

        `note_prefix` says it on the host.
        """
        self._filled.sub_(count)
        self._offset.add_(count)

    def note_prefix(self, prefix: Prefix) -> None:
        """Takes numbers of the host from a prefix whose tensors were written where the old one's are."""
        self.prefix = prefix
        self._first = prefix.source_length

    def evict_to(self, prefix: Prefix, recent: int = 0) -> None:
        if self.prefix is not None and self.has_static_storage and self._fits(prefix):
            # Where a compiled decode expects them.
            self.prefix.starts.copy_(prefix.starts)
            self.prefix.lengths.copy_(prefix.lengths)
            prefix.starts, prefix.lengths = self.prefix.starts, self.prefix.lengths
        else:
            for tensor in (prefix.starts, prefix.lengths):
                torch._dynamo.mark_static_address(tensor)
        if not self.has_static_storage:
            super().evict_to(prefix, recent)
            self._lay_out()
            return
        self._park_tail()
        filled = int(self._filled) if recent else 0
        for storage in (self.keys, self.values):
            storage[:, :, :recent] = storage[:, :, filled - recent : filled].clone()
        self.prefix = prefix
        self._first = prefix.source_length
        self._offset.fill_(self._first)
        self._filled.fill_(recent)

    def forget_last(self, count: int) -> None:
        EvictedLayer.forget_last(self, count)

    def _fits(self, prefix: Prefix) -> bool:
        return self.prefix is not None and self.prefix.starts.shape == prefix.starts.shape

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.has_static_storage and self.is_reading:
            return EvictedLayer.get_mask_sizes(self, query_length)
        return super().get_mask_sizes(query_length)

    @property
    def tail_length(self) -> int:
        return int(self._filled) if self.has_static_storage else super().tail_length

    def _take_rows(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        before = self.prefix
        super()._take_rows(choose)
        if before is None or self.prefix is None:
            return
        if self._fits(before):
            before.starts.copy_(self.prefix.starts)
            before.lengths.copy_(self.prefix.lengths)
            self.prefix.starts, self.prefix.lengths = before.starts, before.lengths
        else:
            torch._dynamo.mark_static_address(self.prefix.starts)
            torch._dynamo.mark_static_address(self.prefix.lengths)

    def _first_croppable_length(self) -> int:
        return self.evicted_length


class StaticSlidingLayer(StaticStorage, UncompressedSlidingLayer):
    """An `UncompressedSlidingLayer` with static storage after the prefill."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.has_static_storage:
            keys, values = UncompressedSlidingLayer.update(self, key_states, value_states, *args, **kwargs)
            if self.is_initialized:
                self._lay_out()
            return keys, values
        if self._before is None:
            return self.append(key_states, value_states)
        return self._read(key_states, value_states)

    def _read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The window and the new tokens; what will be in the window after them moves to the front."""
        filled = int(self._filled)
        first = self._first_needed_slot(filled)
        keys = torch.cat([self.keys[:, :, first:filled], key], dim=2)
        values = torch.cat([self.values[:, :, first:filled], value], dim=2)
        end = keys.shape[2] - self._appended
        start = max(end - self.sliding_window + 1, 0)
        if end - start > self.keys.shape[2]:  # the window is not full yet
            self._allocate(keys[:, :, start:end], values[:, :, start:end], end - start + self._room)
        else:
            self.keys[:, :, : end - start] = keys[:, :, start:end]
            self.values[:, :, : end - start] = values[:, :, start:end]
        self._first += first + start
        self._offset.fill_(self._first)
        self._filled.fill_(end - start)
        return keys, values

    def stored_window(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.has_static_storage:
            return super().stored_window()
        filled = int(self._filled)
        here = slice(self._first_needed_slot(filled), filled)
        return self.keys[:, :, here], self.values[:, :, here]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.has_static_storage and self._before is not None:
            filled = int(self._filled)
            first = self._first_needed_slot(filled)
            return filled - first + query_length, self._first + first
        return super().get_mask_sizes(query_length)

    def begin_reading(self, appended: int) -> None:
        super().begin_reading(appended)
        if self.has_static_storage:
            self._before = self.keys.clone(), self.values.clone(), int(self._filled)
            self._first_before = self._first

    def abandon_reading(self) -> None:
        if self._before is None:
            return
        keys, values, filled = self._before
        if keys is None or values is None:  # there was nothing yet
            self.reset()
            return
        if self.keys.shape == keys.shape:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self._allocate(keys, values, keys.shape[2])
        self._first = self._first_before
        self._offset.fill_(self._first)
        self._filled.fill_(filled)
        self.end_reading()

    def _first_needed_slot(self, filled: int) -> int:
        return max(filled - self.sliding_window + 1, 0)

    def _first_croppable_length(self) -> int:
        return self._first + self.sliding_window - 1 if self._first else 0
