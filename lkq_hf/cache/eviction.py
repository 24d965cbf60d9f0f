"""One eviction: every layer hands in its best candidates, and then all of them are cut to one budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lkq_hf.cache.allocation import most_of_a_head, share_out
from lkq_hf.cache.layers import Candidates
from lkq_hf.cache.prefix import Pool, Prefix
from lkq_hf.cache.tensor_parallel import DividedHeads
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

    A layer hands in no more than a few times its share (`most_of_a_head`), so that at
    most one layer is ever held in full.

    Args:
        budget: mean number of entries to keep per KV head.
        allocation: one of `ALLOCATIONS`.
        profile: for "profile", how many entries each head keeps, ``{layer: [kv_heads]}``.
        static: whether prefixes get the same shapes whatever was read.
        processes: among which the KV heads are divided; None if this one holds all.
    """

    budget: int
    allocation: str
    profile: dict[int, torch.Tensor] | None = None
    static: bool = False
    processes: DividedHeads | None = None
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
        numbers = self.numbers(index, scores.shape[1])
        most = min(most_of_a_head(self.budget, self.allocation, numbers), scores.shape[-1])
        keys, values, chosen = select_compact(scores, candidates.keys, candidates.values, most)
        self._contenders[index] = _Contender(
            keys, values, candidates.positions.gather(-1, chosen), scores.gather(-1, chosen)
        )

    def numbers(self, index: int, heads: int) -> torch.Tensor | None:
        """How many entries the profile gives each of this process's ``heads``."""
        if self.profile is None:
            return None
        numbers = self.profile[index]
        if self.processes is not None and numbers.shape[0] == self.processes.heads:
            numbers = self.processes.own(numbers, heads, 0)
        if numbers.shape[0] != heads:
            raise ValueError(
                f"the adapter's budget_profile has numbers for {numbers.shape[0]} KV heads of layer {index}, and the "
                f"layer has {heads}. It was measured on another model: measure it again with `lkq-hf profile`."
            )
        return numbers

    def _share_out(self) -> list[torch.Tensor]:
        """Which candidates of each layer stay."""
        scores = [each.scores for each in self._contenders.values()]
        if self.allocation == "profile":
            numbers = [self.numbers(index, each.scores.shape[1]) for index, each in self._contenders.items()]
            return share_out(scores, self.budget, self.allocation, [each for each in numbers if each is not None])
        if self.processes is None or self.allocation == "uniform":
            return share_out(scores, self.budget, self.allocation)
        # Heads of all processes compete: each sees everyone's scores, finds the same threshold and keeps its part.
        keep = share_out(self.processes.gather(scores), self.budget, self.allocation)
        return [
            self.processes.own(every, own.shape[1], 1)[..., : own.shape[2]]
            for every, own in zip(keep, scores, strict=True)
        ]

    def settle(self, source_length: int, reuse: Sequence[Pool] = ()) -> dict[int, Prefix]:
        """What each layer keeps.

        Args:
            source_length: tokens of the text that the candidates came from, padding included.
            reuse: pools to write into where they fit.
        """
        keep = self._share_out()
        contenders, self._contenders = self._contenders, {}
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
        if self.static and alone and self.processes is None:
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
                longest = static_longest(self.budget, self.allocation, self.numbers(index, layer.shape[1]))
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
