"""One eviction: every layer hands in its best candidates, and then all of them are cut to one budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lkq_hf.cache.allocation import most_of_a_head, share_out, share_out_stacked
from lkq_hf.cache.layers import Candidates
from lkq_hf.cache.prefix import Pool, Prefix
from lkq_hf.cache.tensor_parallel import DividedHeads
from lkq_hf.kernels.compact_segments import compact_segments
from lkq_hf.kernels.dispatch import ceil_div
from lkq_hf.kernels.select_compact import select_compact

STATIC_MULTIPLE = 64
"""Static shapes are multiples of this many entries."""

_LAYERS_TOGETHER = 8
"""Contenders of so many layers lie in one piece of memory, so that one kernel moves what is kept of them."""


class _Contenders:
    """The best candidates of several layers of one kind, with their scores (minus infinity: none).

    Attributes:
        indices: of the layers, in the order in which they came.
        keys, values: ``[layers, batch, kv_heads, most, features]``.
        positions, scores: ``[layers, batch, kv_heads, most]``.
    """

    def __init__(self, layers: int, most: int, candidates: Candidates) -> None:
        batch, heads = candidates.keys.shape[:2]
        device, shape = candidates.keys.device, (layers, batch, heads, most)
        self.indices: list[int] = []
        self.keys = candidates.keys.new_empty(*shape, candidates.keys.shape[-1])
        self.values = candidates.values.new_empty(*shape, candidates.values.shape[-1])
        self.positions = torch.empty(shape, dtype=torch.int32, device=device)
        self.scores = torch.empty(shape, dtype=torch.float32, device=device)

    @property
    def is_full(self) -> bool:
        return len(self.indices) == self.scores.shape[0]

    def add(self, index: int, candidates: Candidates, scores: torch.Tensor) -> None:
        place = len(self.indices)
        out = self.keys[place], self.values[place], self.positions[place], self.scores[place]
        select_compact(
            scores, candidates.keys, candidates.values, out[3].shape[-1], labels=candidates.positions, out=out
        )
        self.indices.append(index)

    def filled(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of one of the tensors, the layers that have come."""
        return tensor[: len(self.indices)]


@dataclass
class Eviction:
    """Cuts the layers of a cache to a budget.

    A layer hands in no more than a few times its share (`most_of_a_head`), so that at most one layer is ever
    held in full.

    Args:
        budget: mean number of entries to keep per KV head.
        allocation: one of `ALLOCATIONS`.
        profile: for "profile", how many entries each head keeps, ``{layer: [kv_heads]}``.
        static: whether prefixes get the same shapes whatever was read.
        processes: among which the KV heads are divided; None if this one holds all.
        layers_in_all: how many will hand in something; None if that is not known.

    Attributes:
        layers: indices of the layers that have handed in something.
    """

    budget: int
    allocation: str
    profile: dict[int, torch.Tensor] | None = None
    static: bool = False
    processes: DividedHeads | None = None
    layers_in_all: int | None = None
    layers: list[int] = field(default_factory=list)
    _contenders: list[_Contenders] = field(default_factory=list, repr=False)

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
        self._contenders_like(candidates, most).add(index, candidates, scores)
        self.layers.append(index)

    def _contenders_like(self, candidates: Candidates, most: int) -> _Contenders:
        """Where the best ``most`` of these candidates can be put."""
        kind = _kind(candidates.keys, candidates.values)
        for each in reversed(self._contenders):
            if not each.is_full and each.scores.shape[-1] == most and _kind(each.keys[0], each.values[0]) == kind:
                return each
        missing = _LAYERS_TOGETHER if self.layers_in_all is None else self.layers_in_all - len(self.layers)
        self._contenders.append(_Contenders(max(1, min(missing, _LAYERS_TOGETHER)), most, candidates))
        return self._contenders[-1]

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
        """Which candidates stay, bool ``[layers, batch, kv_heads, most]`` for each of the contenders."""
        contenders = self._contenders
        numbers = None
        if self.allocation == "profile":
            given = (self.numbers(index, heads) for index, heads in self._heads().items())
            numbers = [each for each in given if each is not None]
        if self.processes is None and [index for each in contenders for index in each.indices] == self.layers:
            kinds = {(each.scores.shape[1:], each.scores.device) for each in contenders}
            if len(kinds) == 1:
                keep = share_out_stacked(
                    torch.cat([each.filled(each.scores) for each in contenders]),
                    list(self._heads().values()),
                    self.budget,
                    self.allocation,
                    None if numbers is None else torch.stack(numbers)[:, None, :, None],
                )
                return list(keep.split([len(each.indices) for each in contenders]))
        scores = {index: layer for each in contenders for index, layer in zip(each.indices, each.scores, strict=False)}
        kept = dict(
            zip(self.layers, self._share_out_apart([scores[index] for index in self.layers], numbers), strict=True)
        )
        return [torch.stack([kept[index] for index in each.indices]) for each in contenders]

    def _heads(self) -> dict[int, int]:
        """KV heads of each layer that has handed in something, in that order."""
        heads = {index: each.scores.shape[2] for each in self._contenders for index in each.indices}
        return {index: heads[index] for index in self.layers}

    def _share_out_apart(self, scores: list[torch.Tensor], numbers: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """As `share_out`, also where heads of other processes compete."""
        if self.processes is None or self.allocation in ("uniform", "profile"):
            return share_out(scores, self.budget, self.allocation, numbers)
        # Each process sees everyone's scores, finds the same threshold and keeps its part.
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
        order, self.layers = self.layers, []
        contenders, self._contenders = self._contenders, []
        groups: dict[Any, list[tuple[_Contenders, torch.Tensor]]] = {}
        while contenders:
            each = contenders.pop(0)
            groups.setdefault(_kind(each.keys[0], each.values[0])[:4], []).append((each, keep.pop(0)))
        prefixes: dict[int, Prefix] = {}
        for group in groups.values():
            prefixes.update(self._fill_pool(group, source_length, len(groups) == 1, reuse))
        return {index: prefixes[index] for index in order}

    def _fill_pool(
        self,
        group: list[tuple[_Contenders, torch.Tensor]],
        source_length: int,
        alone: bool,
        reuse: Sequence[Pool],
    ) -> dict[int, Prefix]:
        """Moves what is kept of layers of one kind into one pool.

        Args:
            group: contenders, and which of them stay; emptied, to free them one after the other.
            source_length: as for `settle`.
            alone: whether all layers are of this kind.
            reuse: as for `settle`.
        """
        first = group[0][0]
        lengths = [kept.sum(-1, dtype=torch.int32) for _, kept in group]
        counts = torch.cat([each.flatten() for each in lengths])
        starts = (counts.cumsum(0) - counts).split([each.numel() for each in lengths])
        longest: list[list[int]] | None = None
        if self.static and alone and self.processes is None:
            # As many as there can be: known without waiting, and the same for every prompt.
            heads = sum(each.shape[0] * each.shape[2] for each in lengths)
            capacity = static_capacity(self.budget, first.scores.shape[1], heads)
        else:
            on_host = counts.cpu().split([each.numel() for each in lengths])  # the one time that the host waits
            longest = [
                own.view(each.shape[0], -1).amax(1).tolist() for own, each in zip(on_host, lengths, strict=True)
            ]
            capacity = sum(int(own.sum()) for own in on_host)
        pool = next((pool for pool in reuse if _fits(pool, capacity, first)), None)
        pool = Pool.empty(capacity, first.keys, first.values) if pool is None else pool
        prefixes: dict[int, Prefix] = {}
        for place in range(len(group)):
            each, kept = group.pop(0)
            start = starts[place].view(lengths[place].shape)
            keys, values, positions = (
                each.filled(tensor).flatten(0, 1) for tensor in (each.keys, each.values, each.positions)
            )
            compact_segments(
                kept.flatten(0, 1),
                keys,
                values,
                positions,
                start.flatten(0, 1),
                pool.keys,
                pool.values,
                pool.positions,
            )
            of_layers = zip(each.indices, start.unbind(), lengths[place].unbind(), strict=True)
            for layer, (index, start_of_layer, lengths_of_layer) in enumerate(of_layers):
                if self.static:
                    most = static_longest(self.budget, self.allocation, self.numbers(index, start.shape[2]))
                else:
                    most = kept.shape[-1] if longest is None else longest[place][layer]
                prefixes[index] = Prefix(pool, start_of_layer, lengths_of_layer, most, source_length)
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


def _kind(keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """Entries ``[batch, kv_heads, length, features]`` of one kind can lie in one pool; the shapes of one layer."""
    return keys.device, keys.dtype, keys.shape[-1], values.shape[-1], keys.shape[:2]


def _fits(pool: Pool, capacity: int, like: _Contenders) -> bool:
    return (
        pool.keys.shape == (capacity, like.keys.shape[-1])
        and pool.values.shape == (capacity, like.values.shape[-1])
        and (pool.keys.device, pool.keys.dtype) == (like.keys.device, like.keys.dtype)
    )
