"""What an eviction leaves: for each row and KV head its own number of entries, end to end in one tensor.

A *prefix* is what one layer has kept of the text before its last eviction. It does not change until the next
eviction, so rows may share it (beams), and copies of a cache cost nothing but their numbers. Later tokens are not put
into it: they are the *tail* of the layer, an ordinary dense tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

_TENSORS = ("keys", "values", "positions")


@dataclass(eq=False)
class Pool:
    """Entries of all layers of one shape on one device, end to end.

    Attributes:
        keys: ``[capacity, head_dim]``.
        values: ``[capacity, value_dim]``.
        positions: ``[capacity]`` int32, where in the text each entry stands, padding included.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def empty(cls, capacity: int, key: torch.Tensor, value: torch.Tensor) -> "Pool":
        """Room for ``capacity`` entries of the kind of ``key`` and ``value``, ``[..., features]``."""
        return cls(
            # Zeros, not garbage: a kernel may read what it then gives no weight, and 0 times NaN is NaN.
            key.new_zeros(capacity, key.shape[-1]),
            value.new_zeros(capacity, value.shape[-1]),
            torch.zeros(capacity, dtype=torch.int32, device=key.device),
        )

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes


@dataclass(eq=False)
class Prefix:
    """One layer's part of a `Pool`.

    Attributes:
        pool: where the entries lie.
        starts: ``[batch, kv_heads]`` int64, the first entry of each row and head in the pool.
        lengths: ``[batch, kv_heads]`` int32, how many there are.
        longest: no length is larger.
        source_length: tokens of the text that the entries were chosen from, padding included.
    """

    pool: Pool
    starts: torch.Tensor
    lengths: torch.Tensor
    longest: int
    source_length: int

    def padded(self, in_front: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values ``[batch, kv_heads, longest, features]``, positions and validity ``[batch, kv_heads,
        longest]``; what is not valid repeats some entry.

        Args:
            in_front: whether padding lies before the entries, so that each head's last one is the neighbor of what
                follows; else behind them.
        """
        place, valid = places(self.starts, self.lengths, self.longest, in_front)
        index = torch.where(valid, place, 0)
        return self.pool.keys[index], self.pool.values[index], self.pool.positions[index], valid

    def rows(self, index: torch.Tensor) -> "Prefix":
        """The prefix of these rows, ``[rows]`` int64; entries are shared, not copied."""
        index = index.to(self.starts.device)
        return replace(self, starts=self.starts[index], lengths=self.lengths[index])


def places(
    starts: torch.Tensor, lengths: torch.Tensor, longest: int, in_front: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in a pool the entries of segments ``[...]`` lie, and which of them there are, ``[..., longest]`` each.

    Padding lies before them if ``in_front``, else behind them; its places are not to be read.
    """
    column = torch.arange(longest, device=starts.device).expand(*starts.shape, -1)
    if in_front:
        column = column - (longest - lengths[..., None])
    return starts[..., None] + column, (column >= 0) & (column < lengths[..., None])


def stack_prefixes(rows: Sequence[dict[int, Prefix]]) -> dict[int, Prefix]:
    """For each layer one prefix that holds copies of several along the batch.

    Args:
        rows: of each cache, its layers' prefixes; all chosen from texts of the same length.
    """
    pools = dict.fromkeys(prefix.pool for prefixes in rows for prefix in prefixes.values())
    kinds: dict[Any, list[Pool]] = {}
    for pool in pools:
        kinds.setdefault((pool.keys.device, pool.keys.shape[1], pool.values.shape[1]), []).append(pool)
    offsets, together = {}, {}
    for members in kinds.values():
        joined = Pool(*(torch.cat([getattr(pool, name) for pool in members]) for name in _TENSORS))
        start = 0
        for pool in members:
            offsets[pool], together[pool] = start, joined
            start += pool.keys.shape[0]
    stacked = {}
    for index, first in rows[0].items():
        parts = [prefixes[index] for prefixes in rows]
        stacked[index] = Prefix(
            together[first.pool],
            torch.cat([part.starts + offsets[part.pool] for part in parts]),
            torch.cat([part.lengths for part in parts]),
            max(part.longest for part in parts),
            first.source_length,
        )
    return stacked
