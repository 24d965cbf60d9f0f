"""One eviction: every layer hands in its best candidates, and then all of them are cut to one budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lkq_hf.cache.allocation import most_of_a_head, share_out
from lkq_hf.cache.layers import Candidates
from lkq_hf.cache.prefix import Pool, Prefix
from lkq_hf.kernels.compact_segments import compact_segments
from lkq_hf.kernels.dispatch import ceil_div
from lkq_hf.kernels.select_compact import select_compact

STATIC_MULTIPLE = 64
"""Static shapes are multiples of this many entries."""


@dataclass
class _Contender:
    """The best candidates of one layer, ``[batch, kv_heads, most, ...]``, with their scores (minus infinity: none)."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor


@dataclass
class Eviction:
    """Cuts the layers of a cache to a budget.

    A layer hands in no more than a few times its share (:func:`~lkq_hf.cache.allocation.most_of_a_head`), so that at
    most one layer is ever held in full.

    Args:
        budget: mean number of entries to keep per KV head.
        allocation: one of :data:`~lkq_hf.cache.allocation.ALLOCATIONS`.
        profile: for "profile", how many entries each head keeps, ``{layer: [kv_heads]}``.
        static: whether prefixes get the same shapes whatever was read.
    """

    budget: int
    allocation: str
    profile: dict[int, torch.Tensor] | None = None
    static: bool = False
    _contenders: dict[int, _Contender] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that have handed in something."""
        return list(self._contenders)

    def add(self, index: int, candidates: Candidates, scores: torch.Tensor) -> None:
        """Hands in one layer.

        Args:
            index: of the layer.
            candidates: what it chooses from.
            scores: ``[batch, kv_heads, count]``, higher is more important.

        Raises:
            ValueError: the profile has numbers for another number of heads.
        """
        scores = scores.float()  # of a float64 model, float64
        if candidates.valid is not None:
            scores = scores.masked_fill(~candidates.valid, -torch.inf)
        numbers = None if self.profile is None else self.profile[index]
        if numbers is not None and numbers.shape[0] != scores.shape[1]:
            raise ValueError(
                f"the adapter's budget_profile has numbers for {numbers.shape[0]} KV heads of layer {index}, and the "
                f"layer has {scores.shape[1]}. It was measured on another model: measure it again with "
                "`lkq-hf profile`."
            )
        most = min(most_of_a_head(self.budget, self.allocation, numbers), scores.shape[-1])
        keys, values, chosen = select_compact(scores, candidates.keys, candidates.values, most)
        self._contenders[index] = _Contender(
            keys, values, candidates.positions.gather(-1, chosen), scores.gather(-1, chosen)
        )

    def settle(self, source_length: int, reuse: Sequence[Pool] = ()) -> dict[int, Prefix]:
        """What each layer keeps.

        Args:
            source_length: tokens of the text that the candidates came from, padding included.
            reuse: pools to write into where they fit.
        """
        contenders, self._contenders = self._contenders, {}
        profile = None if self.profile is None else [self.profile[index] for index in contenders]
        keep = share_out([each.scores for each in contenders.values()], self.budget, self.allocation, profile)
        groups: dict[Any, list[int]] = {}
        for index, each in contenders.items():
            kind = (each.keys.device, each.keys.dtype, each.keys.shape[-1], each.values.shape[-1])
            groups.setdefault(kind, []).append(index)
        kept = dict(zip(contenders, keep, strict=True))
        prefixes = {}
        for indices in groups.values():
            prefixes.update(self._fill_pool(indices, contenders, kept, source_length, len(groups) == 1, reuse))
        return {index: prefixes[index] for index in kept}

    def _fill_pool(
        self,
        indices: list[int],
        contenders: dict[int, _Contender],
        kept: dict[int, torch.Tensor],
        source_length: int,
        alone: bool,
        reuse: Sequence[Pool],
    ) -> dict[int, Prefix]:
        """Moves what is kept of layers of one kind into one pool."""
        first = contenders[indices[0]]
        lengths = [kept[index].sum(-1, dtype=torch.int32) for index in indices]
        ends = torch.cat([layer.flatten() for layer in lengths]).cumsum(0)
        batch = first.keys.shape[0]
        on_host: list[list[int]] | None = None
        if self.static and alone:
            # As many as there can be: known without waiting, and the same for every prompt.
            capacity = static_capacity(self.budget, batch, sum(layer.shape[1] for layer in lengths))
        else:
            on_host = [layer.flatten().tolist() for layer in lengths]
            capacity = sum(map(sum, on_host))
        pool = next((pool for pool in reuse if _fits(pool, capacity, first)), None)
        pool = Pool.empty(capacity, first.keys, first.values) if pool is None else pool
        prefixes, done = {}, 0
        for place, (index, layer) in enumerate(zip(indices, lengths, strict=True)):
            starts = (ends[done : done + layer.numel()] - layer.flatten()).view(layer.shape)
            done += layer.numel()
            each = contenders.pop(index)
            compact_segments(
                kept[index], each.keys, each.values, each.positions, starts, pool.keys, pool.values, pool.positions
            )
            longest = each.keys.shape[2] if on_host is None else max(on_host[place])
            if self.static:
                numbers = None if self.profile is None else self.profile[index]
                longest = static_longest(self.budget, self.allocation, numbers)
            prefixes[index] = Prefix(pool, starts, layer, longest, source_length)
        return prefixes


def static_capacity(budget: int, batch: int, heads: int) -> int:
    """Entries of a pool with static shapes, for ``heads`` KV heads over all layers."""
    return batch * heads * _rounded(budget)


def static_longest(budget: int, allocation: str, profile: torch.Tensor | None = None) -> int:
    """No head of a prefix with static shapes has more entries; the same for every prompt."""
    return _rounded(most_of_a_head(budget, allocation, profile))


def _rounded(entries: int) -> int:
    """Few distinct sizes, each of which is compiled for."""
    return ceil_div(entries, STATIC_MULTIPLE) * STATIC_MULTIPLE


def _fits(pool: Pool, capacity: int, like: _Contender) -> bool:
    return (
        pool.keys.shape == (capacity, like.keys.shape[-1])
        and pool.values.shape == (capacity, like.values.shape[-1])
        and (pool.keys.device, pool.keys.dtype) == (like.keys.device, like.keys.dtype)
    )
