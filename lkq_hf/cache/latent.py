"""Layers of latent attention (MLA): of each token they keep one latent and one rotary part, whatever the heads.

The model makes keys and values of all heads from what the cache returns. So whole tokens are evicted: one score for
each, the mean over heads, and the latent and the rotary part are kept or dropped together.

Source: multi-head latent attention, DeepSeek-V2 (arXiv 2405.04434, section 2.1).
"""

from typing import TYPE_CHECKING

import torch

from lkq_hf.cache.layers import EvictedLayer
from lkq_hf.cache.static import StaticEvictedLayer

if TYPE_CHECKING:
    _Layer = EvictedLayer
else:
    _Layer = object


class _Latent(_Layer):
    """Mixed into a layer: ``update`` returns what was evicted to before the tail, as the model expands both.

    Attributes:
        keys, values: latents ``[batch, 1, tail, rank]`` and rotary parts ``[batch, 1, tail, rotary_dim]``.
    """

    returns_prefix = True
    _tail: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
    _length_returned = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.is_reading:
            self._tail = keys, values
        if (prefix := self.attended_prefix) is not None:
            kept_keys, kept_values, _, _ = prefix.padded()
            keys, values = torch.cat([kept_keys, keys], dim=2), torch.cat([kept_values, values], dim=2)
        self._length_returned = keys.shape[2]
        return keys, values

    def returned(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether they are as many as ``update`` returned: the model has expanded them."""
        return key.shape[2] == value.shape[2] == self._length_returned

    def read_tail(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (keys, values), self._tail = self._tail, (None, None)  # all layers' together would be a whole text
        return (key, value) if keys is None or values is None else (keys, values)

    def end_reading(self) -> None:
        super().end_reading()
        self._tail = None, None


class LatentLayer(_Latent, EvictedLayer):
    """An `EvictedLayer` of latents."""


class StaticLatentLayer(_Latent, StaticEvictedLayer):
    """A `LatentLayer` with static shapes after the prefill."""
