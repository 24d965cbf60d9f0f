"""What a LookaheadCache holds of one layer: a prefix that was evicted to, and an ordinary tail of later tokens."""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lkq_hf.cache.parking import ParkedEntries
from lkq_hf.cache.prefix import Prefix


def tokens_removed(seen: int, tokens_to_remove: int) -> int:
    """How many of ``seen`` tokens a crop asks to remove: minus its argument, or all beyond it if that is positive."""
    amount = int(tokens_to_remove)
    return max(seen - amount, 0) if amount > 0 else -amount


class Candidates(NamedTuple):
    """The entries among which an eviction chooses.

    Attributes:
        keys, values: ``[batch, kv_heads, >= count, features]``, in the order of the text; what is behind ``count`` is
            not to be chosen.
        positions: ``[batch, kv_heads, count]`` int32, their places in the text, padding included.
        valid: ``[batch, kv_heads or 1, count]`` bool, False for padding; None if there is none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None

    def without_last(self, count: int) -> "Candidates":
        """All but the last ``count``."""
        valid = None if self.valid is None else self.valid[..., :-count]
        return self._replace(positions=self.positions[..., :-count], valid=valid)

    def one_mask_for_all_heads(self) -> torch.Tensor | None:
        """``valid`` as scorers get it: ``[batch, count]`` where all heads have the same candidates."""
        return self.valid[:, 0] if self.valid is not None and self.valid.shape[1] == 1 else self.valid


class LastQueries(NamedTuple):
    """Queries ``[batch, heads, count, head_dim]`` of the last tokens, and how their attention is made of them."""

    query: torch.Tensor
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class EvictedLayer(DynamicLayer):
    """A full-attention layer that stores few entries and reports the length of the text they came from.

    Reporting the logical length is what keeps rotary positions, padded batches and later turns right. Masks are asked
    for the tail alone, which ends at the true position, as for a sliding window; every token sees the whole prefix.

    Args:
        parks: whether everything that is read stays in main memory, to be attended to and chosen from again.

    Attributes:
        keys, values: the tail, ``[batch, kv_heads, tail, head_dim]``: all tokens since the last eviction.
        prefix: what the last eviction kept; None before the first.
        tokens_seen: logical length, padding included.
        parked: entries of the text in main memory; None without ``parks``.
        seen_before: tokens before those that a forward reads, if it `reads_text`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    # Whether `update` returns the prefix before the tail, and the model makes keys and values of both.
    returns_prefix = False

    def __init__(self, parks: bool = False) -> None:
        super().__init__()
        self.prefix: Prefix | None = None
        self.tokens_seen = 0
        self.parked = ParkedEntries() if parks else None
        self._parked_before = 0
        self.seen_before = 0
        self.last_queries: LastQueries | None = None
        self.is_reading = False
        # Weak: what a layer reads is not held until the others have read theirs.
        self._returned: tuple[weakref.ref[torch.Tensor], ...] = ()

    @property
    def evicted_length(self) -> int:
        """Tokens at the beginning of the text of which only the prefix is left."""
        return 0 if self.prefix is None else self.prefix.source_length

    @property
    def reads_text(self) -> bool:
        """Whether ``update`` returns the whole text. Masks are then asked for what is new alone."""
        return self.is_reading and self.parked is not None

    @property
    def attended_prefix(self) -> Prefix | None:
        """What attention has to see before what ``update`` returned."""
        return None if self.reads_text else self.prefix

    def begin_reading(self, appended: int) -> None:
        """From now until `end_reading`, ``update`` returns the tail, or with parking the whole text, with what
        is new, and stores nothing."""
        self.is_reading = True
        if self.parked is not None:
            self._parked_before, self.seen_before = self.parked.length, int(self.get_seq_length())

    def end_reading(self) -> None:
        self.is_reading = False
        self._returned = ()

    def abandon_reading(self) -> None:
        """Goes back to what was stored before `begin_reading`."""
        if self.is_reading and self.parked is not None:
            self.parked.cut(self._parked_before)
        self.end_reading()

    def fetch_ahead(self, count: int) -> None:
        """Begins to bring back what is parked, if the next ``update``, of ``count`` tokens, needs it."""
        if self.is_reading and self.parked is not None and self.is_initialized:
            self.parked.prefetch(self.keys.device, self.seen_before - self.parked.length + count)

    def returned(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether they are what the last ``update`` returned, and not made of it by the model."""
        if not self.is_reading:
            return self.keys is key and self.values is value
        return bool(self._returned) and self._returned[0]() is key and self._returned[1]() is value

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_reading:
            key_states, value_states = self.behind_read(key_states, value_states)
            self._returned = weakref.ref(key_states), weakref.ref(value_states)
            return key_states, value_states
        self.tokens_seen += key_states.shape[-2]
        return self.append(key_states, value_states)

    def read_tail(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds of the keys and values, ``[batch, kv_heads, tail, features]``, that a reading attends
        to, without what was evicted to before them."""
        return key, value

    def behind_read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a forward that reads attends to: its own entries behind the tail, or with parking the whole text."""
        keys, values = self.stored_tail()
        if keys is None or (self.parked is None and not keys.shape[-2]):
            return key, value
        if self.parked is None or not self.parked.length:
            return torch.cat([keys, key], dim=-2), torch.cat([values, value], dim=-2)
        parked, seen = self.parked.length, self.seen_before
        text = self.parked.fetch(key.device, seen - parked + key.shape[-2])
        for whole, tail, new in zip(text, (keys, values), (key, value), strict=True):
            whole[:, :, parked:seen] = tail[:, :, parked - self.evicted_length :]
            whole[:, :, seen:] = new
        return text

    def stored_tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tail, without room for more."""
        return self.keys, self.values

    def observe(self, queries: LastQueries, count: int) -> None:
        """Keeps the last ``count`` queries since the last eviction, for one that no forward reads for."""
        query = queries.query
        if self.last_queries is not None:
            query = torch.cat([self.last_queries.query, query], dim=2)
        self.last_queries = queries._replace(query=query[:, :, -count:].clone())

    def park(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Parks what of a whole text, ``[batch, kv_heads, text, features]``, is not parked yet."""
        if self.parked is not None:
            done = self.parked.length
            self.parked.append(key[:, :, done:], value[:, :, done:])

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts entries behind the tail, and returns the whole tail."""
        return super().update(key, value)

    def candidates(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        tail: int,
        mask: torch.Tensor | None,
        order: torch.Tensor | None = None,
    ) -> Candidates:
        """The prefix and the first ``tail`` entries of ``key`` and ``value``, ``[batch, kv_heads, >= tail, ...]``.

        With parking these are the whole text.

        Args:
            key, value: as the cache holds them.
            tail: entries to choose from.
            mask: ``[batch, length]`` over the text up to the last of them, True for real tokens; None if all are.
            order: 0, 1, 2, ..., int32 ``[>= length]`` on their device, where a caller has it for many layers.
        """
        batch, kv_heads = key.shape[:2]
        prefix = self.attended_prefix
        first = 0 if prefix is None else prefix.source_length
        if order is None:
            order = torch.arange(first + tail, dtype=torch.int32, device=key.device)
        places = order[first : first + tail].expand(batch, kv_heads, -1)
        real = None if mask is None else mask[:, None, first : first + tail].to(key.device)
        if prefix is None:
            return Candidates(key, value, places, real)
        # Scores are pooled over neighbors. What a model has expanded has its padding behind.
        keys, values, positions, valid = prefix.padded(in_front=not self.returns_prefix)
        real = torch.ones_like(places, dtype=torch.bool) if real is None else real.expand(batch, kv_heads, -1)
        return Candidates(
            torch.cat([keys, key], dim=2),
            torch.cat([values, value], dim=2),
            torch.cat([positions, places], dim=2),
            torch.cat([valid, real], dim=2),
        )

    def evict_to(self, prefix: Prefix, recent: int = 0) -> None:
        """Replaces everything but the last ``recent`` tokens by ``prefix``."""
        pool, heads = prefix.pool, prefix.lengths.shape
        self._park_tail()
        if not self.is_initialized:
            self.lazy_initialization(pool.keys, pool.values)
        if recent:
            self.keys, self.values = self.keys[:, :, -recent:].clone(), self.values[:, :, -recent:].clone()
        else:
            self.keys = pool.keys.new_empty(*heads, 0, pool.keys.shape[-1])
            self.values = pool.values.new_empty(*heads, 0, pool.values.shape[-1])
        self.prefix = prefix
        self.tokens_seen = prefix.source_length + recent
        self.last_queries = None

    def _park_tail(self) -> None:
        """Parks what of the tail is not parked yet, before it is dropped."""
        if self.parked is None or not self.is_initialized:
            return
        keys, values = self.stored_tail()
        first = self.parked.length - self.evicted_length
        if first < keys.shape[-2]:
            self.parked.append(keys[:, :, first:], values[:, :, first:])

    def replace_tail(self, keys: torch.Tensor, values: torch.Tensor, tokens_seen: int) -> None:
        """Stores a tail, ``[batch, kv_heads, tail, features]``, which ends a text of ``tokens_seen`` tokens."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values, self.tokens_seen = keys, values, tokens_seen

    def restore(
        self,
        prefix: Prefix | None,
        tail: tuple[torch.Tensor, torch.Tensor],
        parked: Sequence[tuple[torch.Tensor, torch.Tensor]],
        last_queries: LastQueries | None,
    ) -> None:
        """Puts what a saved layer held into this empty one."""
        if prefix is not None:
            self.evict_to(prefix)
        for key, value in parked:
            if self.parked is not None:
                self.parked.restore(key, value, tail[0].device)
        if tail[0].shape[2]:
            self.update(*tail)
        self.last_queries = last_queries

    def kept(self) -> torch.Tensor | None:
        """Which of the first `evicted_length` tokens each row and head has kept, bool ``[batch, kv_heads,
        evicted_length]``; None before the first eviction."""
        if self.prefix is None:
            return None
        _, _, positions, valid = self.prefix.padded()
        kept = torch.zeros(*valid.shape[:2], self.evicted_length + 1, dtype=torch.bool, device=valid.device)
        return kept.scatter_(-1, torch.where(valid, positions, self.evicted_length).long(), True)[..., :-1]

    def entries_by_head(self) -> list[float]:
        """Entries stored for each KV head, mean over the batch."""
        heads = self.keys.shape[1]
        kept = [0] * heads if self.prefix is None else self.prefix.lengths.sum(0).tolist()
        return [total / self.keys.shape[0] + self.tail_length for total in kept]

    @property
    def tail_length(self) -> int:
        """Tokens in the tail."""
        return self.tokens_seen - self.evicted_length

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.reads_text:
            return query_length, self.seen_before
        return self.tail_length + query_length, self.evicted_length

    def croppable(self, tokens_to_remove: int) -> int:
        """How many tokens a `crop` removes.

        Raises:
            ValueError: it cannot.
        """
        remove = tokens_removed(self.tokens_seen, tokens_to_remove)
        if self.tokens_seen - remove < self.evicted_length:
            raise ValueError(
                f"cannot remove {remove} of {self.tokens_seen} tokens: entries of the first {self.evicted_length} "
                "were evicted, so the cache cannot go back before them. Start again with a new LookaheadCache."
            )
        return remove

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens.

        Args:
            tokens_to_remove: minus the number of tokens to remove, or (older transformers) the length to crop to.

        Raises:
            ValueError: the crop reaches into the part of the text from which entries were evicted.
        """
        remove = self.croppable(tokens_to_remove)
        if remove:
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
            self.tokens_seen -= remove
            self.forget_last(remove)

    def forget_last(self, count: int) -> None:
        """Drops what is kept of the last ``count`` tokens beside their entries, which a crop has removed."""
        if self.parked is not None:
            self.parked.cut(int(self.get_seq_length()))
        if self.last_queries is not None and count:
            query = self.last_queries.query[:, :, :-count]
            self.last_queries = self.last_queries._replace(query=query) if query.shape[2] else None

    def reset(self) -> None:
        super().reset()
        self.__init__(self.parked is not None)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(lambda row: row[beam_idx.to(row.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._take_rows(lambda row: row.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_rows(lambda row: row[indices.to(row.device)])

    def _take_rows(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.last_queries is not None:
            rows = choose(torch.arange(self.last_queries.query.shape[0], device=self.last_queries.query.device))
            self.last_queries = self.last_queries._replace(query=self.last_queries.query[rows])
        if self.prefix is not None:
            rows = torch.arange(self.prefix.starts.shape[0], device=self.prefix.starts.device)
            self.prefix = self.prefix.rows(choose(rows))
            if self.parked is not None:
                self.parked.take_rows(choose(rows))


class UncompressedSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer: already bounded, so left alone, but for tokens that are appended to a forward."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._appended = 0
        self._before: tuple[torch.Tensor | None, torch.Tensor | None, int] | None = None

    def croppable(self, tokens_to_remove: int) -> int:
        """How many tokens a ``crop`` removes.

        Raises:
            ValueError: it cannot.
        """
        seen = self.get_seq_length()
        remove = tokens_removed(seen, tokens_to_remove)
        stored = self.keys.shape[-2] if self.is_initialized else 0
        # A crop drops what has left the window, recorded or not: the next one may not go back behind that.
        dropped = stored - remove < min(seen - remove, self.sliding_window - 1)
        if dropped or (seen >= self.sliding_window and not self.record_past):
            raise ValueError(
                f"cannot remove {remove} of {seen} tokens: what a window of {self.sliding_window} needs there was "
                "dropped. Call activate_past_recording() on the LookaheadCache before it reads anything, and remove "
                "tokens by one crop after each forward."
            )
        return remove

    def stored_window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the next token needs."""
        count = min(self.get_seq_length(), self.sliding_window - 1)
        first = self.keys.shape[-2] - count
        return self.keys[:, :, first:], self.values[:, :, first:]

    def restore_window(self, key: torch.Tensor, value: torch.Tensor, tokens_seen: int) -> None:
        """Puts the window that ends a text of ``tokens_seen`` tokens into this empty layer."""
        self.cumulative_length = tokens_seen - key.shape[-2]
        self.update(key, value)

    def begin_reading(self, appended: int) -> None:
        """The last ``appended`` tokens of the next ``update`` are seen and not stored."""
        self._appended = appended
        self._before = self.keys, self.values, self.cumulative_length

    def end_reading(self) -> None:
        self._appended = 0
        self._before = None

    def abandon_reading(self) -> None:
        """Goes back to what was stored before `begin_reading`."""
        if self._before is not None:
            self.keys, self.values, self.cumulative_length = self._before  # type: ignore[assignment]
            self.is_initialized = self.keys is not None
        self.end_reading()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = key_states.shape[-2] - self._appended
        if length == 0:  # a pass of appended tokens alone
            keys, values = self.keys, self.values
        else:
            keys, values = super().update(key_states[:, :, :length], value_states[:, :, :length], *args, **kwargs)
            # While it records the past, older transformers (5.17) returns more than it tells the mask.
            told = self.sliding_window - 1 + length
            keys, values = keys[:, :, -told:], values[:, :, -told:]
        if self._before is None:
            return keys, values
        # A slice would keep the whole prompt alive.
        self.keys, self.values = self.keys.clone(), self.values.clone()
        if keys.shape[-2] == length:
            return key_states, value_states
        return (
            torch.cat([keys, key_states[:, :, length:]], dim=-2),
            torch.cat([values, value_states[:, :, length:]], dim=-2),
        )
