"""Cache layers that take part in one compressing prefill and are ordinary dynamic layers afterwards."""

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lkq_hf.kernels.select_compact import select_compact


def tokens_removed(seen: int, tokens_to_remove: int) -> int:
    """How many of ``seen`` tokens a crop asks to remove: minus its argument, or all beyond it if that is positive."""
    amount = int(tokens_to_remove)
    return max(seen - amount, 0) if amount > 0 else -amount


class EvictedLayer(DynamicLayer):
    """A full-attention layer that stores few entries and reports the length of the text they came from.

    Reporting the logical length is what keeps rotary positions, padded batches and later turns right: the mask is
    asked for ``stored + new`` columns that end at the true position, as for a sliding window.

    Attributes:
        keys, values: ``[batch, kv_heads, stored, head_dim]``.
        kept_indices: ``[batch, kv_heads, kept]`` positions in the prompt of the entries kept by the eviction, sorted;
            None if nothing was evicted.
        tokens_seen: logical length, padding included.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kept_indices: torch.Tensor | None = None
        self.tokens_seen = 0
        self._evicted_length = 0
        self._awaits_eviction = False
        self._handed_through: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        # Scores and budget of an eviction that waits until drafted tokens are accepted or cropped.
        self._deferred: tuple[torch.Tensor, int] | None = None

    def begin_prefill(self) -> None:
        """From now until :meth:`evict`, ``update`` hands the states through and stores nothing."""
        self._awaits_eviction = True

    def awaits_eviction_of(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether they are what the last ``update`` of a prefill handed through, and not made of it by the model."""
        return self._handed_through[0] is key and self._handed_through[1] is value

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._awaits_eviction:
            self._handed_through = key_states, value_states
            return key_states, value_states
        self.tokens_seen += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def evict(self, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor, budget: int, defer: bool) -> None:
        """Stores the ``budget`` entries with the highest scores for each KV head.

        Args:
            key, value: ``[batch, kv_heads, >= length, head_dim]``; entries from ``length`` on are dropped.
            scores: ``[batch, kv_heads, length]``.
            budget: entries to keep, less than ``length``.
            defer: store everything now and evict at the next :meth:`crop`, which says how many tokens at the end were
                only drafts.
        """
        length = scores.shape[-1]
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.tokens_seen = length
        self._awaits_eviction = False
        self._handed_through = None, None
        if defer:
            self.keys, self.values = key[:, :, :length].clone(), value[:, :, :length].clone()
            self._deferred = (scores, budget)
        else:
            self.keys, self.values, self.kept_indices = select_compact(scores, key, value, budget)
            self._evicted_length = length

    @property
    def stored(self) -> int:
        """Entries stored for each KV head."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.stored + query_length, self.tokens_seen - self.stored

    def croppable(self, tokens_to_remove: int) -> int:
        """How many tokens a :meth:`crop` removes.

        Raises:
            ValueError: it cannot.
        """
        remove = tokens_removed(self.tokens_seen, tokens_to_remove)
        if self.tokens_seen - remove < self._evicted_length:
            raise ValueError(
                f"cannot remove {remove} of {self.tokens_seen} tokens: entries of the first {self._evicted_length} "
                "were evicted, so the cache cannot go back before them. Start again with a new LookaheadCache."
            )
        return remove

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens.

        Args:
            tokens_to_remove: minus the number of tokens to remove, or (older transformers) the length to crop to.

        Raises:
            ValueError: the crop reaches into the part of the prompt from which entries were evicted.
        """
        remove = self.croppable(tokens_to_remove)
        if remove:
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
            self.tokens_seen -= remove
        if self._deferred is not None:
            scores, budget = self._deferred
            self._deferred = None
            length = min(scores.shape[-1], self.tokens_seen)
            if budget < length:
                later = self.keys[:, :, length:], self.values[:, :, length:]
                self.evict(self.keys, self.values, scores[..., :length], budget, defer=False)
                if later[0].shape[-2]:
                    self.update(*later)

    def reset(self) -> None:
        super().reset()
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_batch(lambda tensor: tensor[indices])

    def _map_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.kept_indices is not None:
            self.kept_indices = change(self.kept_indices)
        if self._deferred is not None:
            self._deferred = (change(self._deferred[0]), self._deferred[1])


class UncompressedSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer: already bounded, so left alone, but for the tokens appended during the prefill."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._prefill_length: int | None = None

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

    def begin_prefill(self, length: int) -> None:
        """The next ``update`` brings the prompt's ``length`` tokens and appended ones, which are not stored."""
        self._prefill_length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._prefill_length is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            # While it records the past, older transformers (5.17) returns more than it tells the mask.
            told = self.sliding_window - 1 + key_states.shape[-2]
            return keys[:, :, -told:], values[:, :, -told:]
        length, self._prefill_length = self._prefill_length, None
        super().update(key_states[:, :, :length], value_states[:, :, :length], *args, **kwargs)
        # A slice would keep the whole prompt alive.
        self.keys, self.values = self.keys.clone(), self.values.clone()
        return key_states, value_states
