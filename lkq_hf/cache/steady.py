"""An eviction between two tokens of a long answer, where all shapes are those of the eviction before.

Once an answer has been refreshed, every layer holds a full prefix and, when the next refresh is due, a tail of twice
``refresh_every`` tokens, of which the first half is up for eviction. So with static shapes nothing has to be asked of
the device; where storage grows, only how long the longest prefix has become.
Entries stay where they lie until all layers are scored. One comparison over all heads decides, and one gather for
keys, one for values and one for positions writes the new prefixes. `lkq_hf.cache.recorded` replays that as a CUDA
graph.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lkq_hf.attention import AttentionCall, attending, lookahead_positions
from lkq_hf.cache.allocation import most_of_a_head, share_out
from lkq_hf.cache.attend import attend_over
from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.eviction import Eviction, static_capacity, static_longest
from lkq_hf.cache.layers import EvictedLayer, LastQueries
from lkq_hf.cache.prefix import Pool, Prefix, places
from lkq_hf.cache.static import StaticEvictedLayer
from lkq_hf.cache.suffix import suffix_inputs
from lkq_hf.compat import pass_cache
from lkq_hf.kernels.ragged_attention import causal
from lkq_hf.scoring import PrefillAttention, Scorer


def is_steady(cache: EvictedCache, eviction: Eviction) -> bool:
    """Whether a refresh of ``cache`` leaves all shapes as they are."""
    layers, every = cache.layers, cache.refresh_every
    kind, first = type(layers[0]), layers[0]
    if kind not in (EvictedLayer, StaticEvictedLayer) or any(type(layer) is not kind for layer in layers):
        return False  # windows and recurrent states
    prefixes = [layer.prefix for layer in layers]
    if every is None or not isinstance(cache.budget, int) or cache.park is not None or eviction.processes is not None:
        return False
    if None in prefixes or first.tail_length != 2 * every:
        return False
    pairs = zip(prefixes, layers, strict=True)
    if len({(prefix.pool, prefix.starts.shape, layer.keys.device) for prefix, layer in pairs}) > 1:
        return False
    batch, heads = first.prefix.starts.shape
    capacity = first.prefix.pool.keys.shape[0]
    if kind is EvictedLayer:
        return capacity == batch * heads * len(layers) * eviction.budget
    return capacity == static_capacity(eviction.budget, batch, heads * len(layers)) and all(
        prefix.longest == static_longest(eviction.budget, eviction.allocation, eviction.numbers(index, heads))
        for index, prefix in enumerate(prefixes)
    )


class AppendedTokens(Cache):
    """What the decoder gets for a cache: it hands back the entries of the scorer's tokens, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions and masks are given


@dataclass
class Inputs:
    """What differs between refreshes of the same shapes.

    Attributes:
        real: ``[batch, 2 * refresh_every]``, False for padding of the tail.
        positions: ``[batch, suffix]`` of the scorer's tokens.
        numbers: for "profile", how many entries each head of each layer keeps, ``[kv_heads]``.
    """

    real: torch.Tensor
    positions: torch.Tensor
    numbers: list[torch.Tensor]

    def take(self, other: "Inputs") -> None:
        """Copies the values of another refresh."""
        own, new = ([each.real, each.positions, *each.numbers] for each in (self, other))
        if own[0] is not new[0]:
            torch._foreach_copy_(own, new)


@dataclass
class SteadyRefresh:
    """One refresh for whose cache `is_steady` holds.

    Attributes:
        decoder: the stack of layers.
        cache: what has grown.
        scorer: bound to the decoder.
        budget: mean number of entries per KV head.
        allocation: one of `ALLOCATIONS`.
        inputs: what differs from the refresh before.
    """

    decoder: PreTrainedModel
    cache: EvictedCache
    scorer: Scorer
    budget: int
    allocation: str
    inputs: Inputs
    _scores: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    _places: torch.Tensor = field(init=False, repr=False)
    _read: torch.Tensor = field(init=False, repr=False)
    _valid: torch.Tensor = field(init=False, repr=False)
    _mask: torch.Tensor = field(init=False, repr=False)

    @classmethod
    def prepare(
        cls, decoder: PreTrainedModel, cache: EvictedCache, scorer: Scorer, eviction: Eviction, mask: Any
    ) -> "SteadyRefresh":
        """The refresh that is due.

        Args:
            decoder: the stack of layers.
            cache: for which `is_steady` holds.
            scorer: bound to the decoder.
            eviction: that ``cache`` has begun.
            mask: ``[batch, >= text]``, 1 for real tokens; None if there is no padding.
        """
        first, seen = cache.layers[0], int(cache.get_seq_length())
        batch, heads = first.prefix.starts.shape
        device, tail = first.keys.device, 2 * (cache.refresh_every or 0)
        suffix = scorer.suffix(decoder)
        following = torch.arange(0 if suffix is None else suffix.shape[1], device=device)
        if isinstance(mask, torch.Tensor):
            mask = mask[:, :seen].to(device, torch.bool, copy=True)
            real, positions = mask[:, seen - tail :], mask.sum(-1, keepdim=True) + following
        else:
            real = torch.ones(batch, tail, dtype=torch.bool, device=device)
            positions = (seen + following).repeat(batch, 1)
        numbers = [eviction.numbers(index, heads) for index in range(len(cache.layers))]
        inputs = Inputs(real, positions, [each.to(device) for each in numbers if each is not None])
        return cls(decoder, cache, scorer, eviction.budget, eviction.allocation, inputs)

    def storage(self) -> list[int]:
        """Where everything lies that `run` reads and writes."""
        layers = self.cache.layers
        pool = layers[0].prefix.pool
        tensors = [pool.keys, pool.values, pool.positions]
        for layer in layers:
            tensors += [layer.keys, layer.values, layer.offset, layer.prefix.starts, layer.prefix.lengths]
        return [tensor.data_ptr() for tensor in tensors]

    def settings(self) -> Any:
        """What else decides on what `run` does."""
        shapes = self.inputs.real.shape, self.inputs.positions.shape, self.cache.layers[0].keys.shape
        return id(self.decoder), self.scorer, self.budget, self.allocation, shapes

    def run(self) -> None:
        """Carries out the refresh. With static shapes it waits for nothing, and `note` has to follow."""
        scores = self._score_all()
        keep = torch.stack(
            share_out(
                scores, self.budget, self.allocation, self.inputs.numbers, most_of_a_head(self.budget, self.allocation)
            )
        )
        self._evict(keep)

    def note(self) -> None:
        """What the host keeps of a cache with static shapes."""
        every = self.cache.refresh_every or 0
        prefixes = {
            index: replace(layer.prefix, source_length=layer.prefix.source_length + every)
            for index, layer in enumerate(self.cache.layers)
        }
        self.cache.evict_to(prefixes, every, True)

    def _score_all(self) -> list[torch.Tensor]:
        """Scores ``[batch, kv_heads, candidates]`` of each layer: the longest prefix, and the tail's first half."""
        cache, suffix = self.cache, self.scorer.suffix(self.decoder)
        prefixes = [layer.prefix for layer in cache.layers]
        starts, lengths = (torch.stack([getattr(each, name) for each in prefixes]) for name in ("starts", "lengths"))
        longest = max(prefix.longest for prefix in prefixes)
        self._places, inside = places(starts, lengths, longest, in_front=True)
        real = self.inputs.real[:, None].expand(*inside.shape[:3], -1)
        self._valid = torch.cat([inside, real], dim=-1)
        # What is no entry repeats some one.
        self._read = torch.where(inside, self._places, 0)
        self._scores.clear()
        if suffix is None:
            for index, layer in enumerate(cache.layers):
                key, value = layer.stored_tail()
                queries = layer.last_queries or LastQueries(key[:, :, :0], 1.0)
                self._score(index, queries, key[:, :, : self.inputs.real.shape[1]], value, queries.query.shape[2])
        else:
            self._append(suffix)
        return [self._scores.pop(index) for index in range(len(cache.layers))]

    def _append(self, suffix: torch.Tensor) -> None:
        """Runs the scorer's tokens behind what is stored."""
        batch, count = self.inputs.positions.shape
        seen = torch.cat([self.inputs.real, self.inputs.real.new_ones(batch, count)], dim=1)
        self._mask = seen[:, None, None] & causal(count, seen.shape[1], seen.device)
        inputs: dict[str, Any] = {
            **suffix_inputs(self.decoder, suffix, self.scorer.suffix_per_layer(self.decoder), batch),
            "attention_mask": self._mask,
            "position_ids": self.inputs.positions,
            "use_cache": True,
            **pass_cache(AppendedTokens()),
        }
        active = count if self.scorer.uses_adapter else 0
        with attending(self.decoder, self._attend), lookahead_positions(active, (batch, count)):
            self.decoder(**inputs)

    def _attend(self, call: AttentionCall) -> Any:
        index: int = call.module.layer_idx  # type: ignore[assignment]
        layer, tail = self.cache.layers[index], self.inputs.real.shape[1]
        key = torch.cat([layer.keys[:, :, :tail], call.key], dim=2)
        value = torch.cat([layer.values[:, :, :tail], call.value], dim=2)
        options = call.options
        queries = LastQueries(call.query, call.scaling, options.get("softcap"), options.get("s_aux"))
        self._score(index, queries, key, value, 0)
        return attend_over(replace(call, key=key, value=value, mask=self._mask), layer.prefix, None)

    def _score(
        self, index: int, queries: LastQueries, key: torch.Tensor, value: torch.Tensor, new_length: int
    ) -> None:
        """Scores one layer, of which ``key`` and ``value`` are the tail and the scorer's tokens."""
        layer = self.cache.layers[index]
        pool, place, valid = layer.prefix.pool, self._read[index], self._valid[index]
        scores = self.scorer.score(
            PrefillAttention(
                query=queries.query,
                key=torch.cat([pool.keys[place], key], dim=2),
                value=torch.cat([pool.values[place], value], dim=2),
                length=valid.shape[-1],
                suffix_length=self.inputs.positions.shape[1],
                budget=self.budget,
                scaling=queries.scaling,
                softcap=queries.softcap,
                sinks=queries.sinks,
                mask=valid,
                layer_index=index,
                new_length=new_length,
            )
        )
        scores = scores.float().masked_fill(~valid, -torch.inf)
        self._scores[index] = scores[..., : scores.shape[-1] - self.inputs.real.shape[1] // 2]

    def _evict(self, keep: torch.Tensor) -> None:
        """Writes the new prefixes, ``keep [layers, batch, kv_heads, candidates]`` of what the layers hold."""
        layers, first = self.cache.layers, self.cache.layers[0]
        pool, every = first.prefix.pool, self.inputs.real.shape[1] // 2
        capacity = pool.keys.shape[0]
        lengths = keep.sum(-1, dtype=torch.int32)
        starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view(lengths.shape)
        # Where each candidate lies: in the pool, or in the tails, end to end behind it.
        in_tails = torch.arange(capacity, capacity + starts.numel() * every, device=keep.device).view(
            *starts.shape, -1
        )
        source = torch.cat([self._places, in_tails], dim=-1)
        # Where it goes: what is dropped, to one place too many.
        target = torch.where(keep, starts[..., None] + keep.cumsum(-1) - 1, capacity)
        index = source.new_zeros(capacity + 1).scatter_(0, target.flatten(), source.flatten())[:capacity]
        tails = torch.arange(every, dtype=torch.int32, device=keep.device) + self._first_of_tail()
        static = isinstance(first, StaticEvictedLayer)

        def gather(stored: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
            together = torch.cat([stored, torch.cat(parts).flatten(0, 2)])
            return torch.index_select(together, 0, index, out=stored if static else None)

        moved = Pool(
            gather(pool.keys, [layer.keys[:, :, :every] for layer in layers]),
            gather(pool.values, [layer.values[:, :, :every] for layer in layers]),
            gather(pool.positions, [tails.expand(starts.numel(), 1, -1)]),
        )
        if static:
            self._write(starts, lengths)
            return
        longest = int(lengths.max())  # the host waits
        source_length = first.prefix.source_length + every
        parts = zip(starts.unbind(), lengths.unbind(), strict=True)
        prefixes = {index: Prefix(moved, *part, longest, source_length) for index, part in enumerate(parts)}
        self.cache.evict_to(prefixes, every)

    def _first_of_tail(self) -> Any:
        """Position of the first token behind the prefix; on the device where a graph has to read it."""
        first = self.cache.layers[0]
        return first.offset if isinstance(first, StaticEvictedLayer) else first.evicted_length

    def _write(self, starts: torch.Tensor, lengths: torch.Tensor) -> None:
        """Writes new numbers, and moves recent tokens to the front, where a compiled decode expects them."""
        layers, every = self.cache.layers, self.inputs.real.shape[1] // 2
        prefixes = [layer.prefix for layer in layers]
        torch._foreach_copy_([prefix.starts for prefix in prefixes], list(starts.unbind()))
        torch._foreach_copy_([prefix.lengths for prefix in prefixes], list(lengths.unbind()))
        stored = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        torch._foreach_copy_(
            [tensor[:, :, :every] for tensor in stored], [tensor[:, :, every : 2 * every] for tensor in stored]
        )
        for layer in layers:
            layer.drop_first(every)
