"""The cache while it is read into and evicted: everything but saving, loading and sharing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from lkq_hf.attention import implementation_of
from lkq_hf.cache.allocation import ALLOCATIONS, MOST
from lkq_hf.cache.build import build_layers
from lkq_hf.cache.eviction import Eviction
from lkq_hf.cache.fingerprint import ModelReference
from lkq_hf.cache.history import Generation, ReadText
from lkq_hf.cache.layers import EvictedLayer
from lkq_hf.cache.parking import PLACES
from lkq_hf.cache.prefix import Pool, Prefix
from lkq_hf.cache.profile import BudgetProfile
from lkq_hf.cache.recurrent import RecurrentLayer
from lkq_hf.cache.static import (
    MASKED_ATTENTION,
    StaticStorage,
)
from lkq_hf.cache.tensor_parallel import divided_heads
from lkq_hf.scoring import Scorer, get_scorer
from lkq_hf.scoring.lookahead import ADAPTER_ATTRIBUTE


class EvictedCache(Cache):
    """What a `LookaheadCache` is while a model reads and answers; the arguments are described there."""

    def __init__(
        self,
        budget: int | float,
        scorer: str | Scorer = "lookahead",
        max_new_tokens: int | None = None,
        allocation: str = "global",
        evict_later_turns: bool = True,
        refresh_every: int | None = None,
        park: str | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.layers: list[Any]
        self.budget = _check_budget(budget)
        self.scorer = get_scorer(scorer)
        self.max_new_tokens = _check_whole("max_new_tokens", max_new_tokens)
        self.allocation = check_allocation(allocation)
        self.evict_later_turns = evict_later_turns
        self.refresh_every = _check_whole("refresh_every", refresh_every)
        self.park = _check_park(park)
        self._profile: BudgetProfile | None = None
        self._model = ModelReference()
        self._records_past = False
        # A later turn begins with the next forward, even if that has one token only.
        self._turn_begins = False
        # Slots that are free for certain; the exact number is on the device.
        self._free_slots = 0
        self._deferred: _Deferred | None = None
        # Length of a text that is being read in pieces, up to the end of the last one.
        self._turn_end = 0
        self._turn_is_first = True
        # Which piece of such a text the last forward read: 1 for the first, 2 for a later one, else 0.
        self._piece = 0
        # At least as many tokens as there are since the last reading.
        self._since_reading = 0
        self.text = ReadText()
        self.generation = Generation()
        # Of refreshes with static shapes; see lkq_hf.cache.refresh.
        self.recorded_refresh: Any = None
        # A text: a bound scorer of a user's own may hold the model.
        self._scorer_in_use = repr(self.scorer)

    def entries_to_keep(self, length: int) -> int:
        """Entries that a text of ``length`` tokens keeps per KV head on average, at most ``length``."""
        if isinstance(self.budget, int):
            return min(self.budget, length)
        return min(max(round(self.budget * length), 1), length)

    @property
    def has_prompt(self) -> bool:
        """Whether a prompt has been read."""
        return self._has_static_storage or self.get_seq_length() > 0

    @property
    def has_prefix(self) -> bool:
        """Whether something was evicted."""
        return any(self.layers[index].prefix is not None for index in self.evicted_layers())

    @property
    def _is_reading(self) -> bool:
        return any(layer.is_reading for layer in self.layers if isinstance(layer, EvictedLayer))

    def evicted_layers(self) -> list[int]:
        """Indices of the layers that are cut to the budget."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, EvictedLayer)]

    def begin_turn(self, length: int | None = None) -> None:
        """Says that the next forward reads a prompt or a later turn, even if it has one token only.

        Args:
            length: where the turn is read in several forwards, the length of the text after the last of them, padding
                and what was read before included. Until then several times the budget is kept.

        Example:

            >>> cache.begin_turn(length=ids.shape[1])
            >>> for chunk in ids.split(8192, dim=1):
            ...     output = model(chunk, past_key_values=cache, logits_to_keep=1)
        """
        self._turn_begins = True
        self._turn_end = length or 0
        self._turn_is_first = not self.has_prompt

    @property
    def expects_turn(self) -> bool:
        """Whether the next forward reads a prompt, a turn or a piece of one, even if it has one token only."""
        return self._turn_begins or self._turn_end > 0

    @property
    def _turn_is_under_way(self) -> bool:
        return self._turn_end > 0 and int(self.get_seq_length()) < self._turn_end

    def end_turn_begin(self) -> None:
        """Says that it is under way."""
        self._turn_begins = False

    def record_text(self, ids: torch.Tensor | None, length: int) -> None:
        """Notes that a forward is going to read ``length`` tokens.

        Args:
            ids: ``[batch, length]``; None if they are not known.
            length: tokens. A single one of a decode is not noted.
        """
        is_piece = self._turn_is_under_way
        self._piece = 0 if not is_piece else 1 if self._turn_begins else 2
        if length > 1 or self._turn_begins or not self.has_prompt or is_piece:
            seen = int(self.get_seq_length())
            self.text.record(seen, ids, seen + length)
            self.end_pieces(length)
            if not self._has_static_storage:
                self._since_reading += length
        elif not self._has_static_storage:  # without waiting for the device
            self.text.cut(int(self.get_seq_length()))

    def end_pieces(self, length: int) -> None:
        """Says that no piece of the turn follows, if the forward that is going to read ``length`` tokens ends it."""
        if self._turn_end and int(self.get_seq_length()) + length >= self._turn_end:
            self._turn_end = 0

    def keeps_after(self, length: int) -> int:
        """Entries per KV head that are kept on average when ``length`` tokens of the text have been read."""
        if length >= self._turn_end:
            return self.entries_to_keep(length)
        return min(MOST * self.entries_to_keep(self._turn_end), length)

    def will_read(self, length: int) -> bool:
        """Whether a forward of ``length`` tokens reads, and then evicts, instead of adding to what there is.

        The first prompt is read, and what follows if it is a turn: more than one token, or announced by
        `begin_turn`. Nothing is evicted while the whole text fits into the budget.
        """
        if self.has_prompt:
            under_way = self._turn_is_under_way
            evicts = self.evict_later_turns or (under_way and self._turn_is_first)
            if self._records_past or not evicts or not (length > 1 or self._turn_begins or under_way):
                return False
        total = int(self.get_seq_length()) + length if self.has_prompt else length
        return self.keeps_after(total) < total

    def bind_scorer(self, decoder: nn.Module) -> Scorer:
        """The scorer with what the model's adapter says.

        Raises:
            ValueError: the scorer needs an active adapter, and there is none.
        """
        scorer = self.scorer.bind(decoder)
        self._scorer_in_use = repr(scorer)
        return scorer

    @property
    def observed_queries(self) -> int:
        """How many of the last tokens' queries are kept for a refresh."""
        return self.scorer.observed_queries if self.refresh_every is not None else 0

    @property
    def queries_of_pieces(self) -> int:
        """How many of the last tokens' queries are kept for the next piece of a turn that is read in pieces."""
        return self.scorer.observed_queries if self._piece else 0

    @property
    def continues_pieces(self) -> bool:
        """Whether the forward under way reads a piece of a turn, and not its first one."""
        return self._piece == 2

    @property
    def expects_piece(self) -> bool:
        """Whether another piece of the turn is to be read."""
        return self._turn_end > 0

    def refresh_is_due(self) -> bool:
        """Whether enough tokens have come since the last eviction for another one, before the next token.

        As many as ``refresh_every`` are never up for eviction, so twice as many.
        """
        if self.refresh_every is None or self._records_past or not self.has_prompt:
            return False
        if self._has_static_storage and self._since_reading < 2 * self.refresh_every:
            return False  # without waiting for the device
        seen, layer = int(self.get_seq_length()) - self.refresh_every, self.layers[self.evicted_layers()[0]]
        if self.observed_queries and layer.last_queries is None:
            return False
        since = layer.tail_length
        return since >= 2 * self.refresh_every and self.entries_to_keep(seen) < seen

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decode; it asks before the prompt is read."""
        # A compiled graph would hide the queries that a refresh needs.
        return self.max_new_tokens is not None and not self._records_past and not self.observed_queries

    @property
    def _has_static_storage(self) -> bool:
        first = next((layer for layer in self.layers if isinstance(layer, StaticStorage)), None)
        return first is not None and first.has_static_storage

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have a state of fixed size and no entries."""
        return [type(layer) is RecurrentLayer for layer in self.layers]

    def build_layers(self, config: PreTrainedConfig) -> None:
        """Creates the empty layers that a model with this config needs.

        Raises:
            NotImplementedError: the model has layers whose entries cannot be evicted, or none with entries to evict.
            ValueError: static shapes are asked for, and the model's attention cannot mask the slots not yet written.
        """
        if self.is_compileable and implementation_of(config) not in MASKED_ATTENTION:
            raise ValueError(
                "LookaheadCache(max_new_tokens=...) has static shapes, of which the attention must mask what is not "
                f"yet written; expected {' or '.join(MASKED_ATTENTION)}, found {implementation_of(config)}. Call "
                'model.set_attn_implementation("sdpa"), or leave max_new_tokens out.'
            )
        room = self.max_new_tokens or 0
        if self.refresh_every is not None:
            room = min(room, 2 * self.refresh_every)
        self.layers = build_layers(config, self.park is not None, room if self.is_compileable else None)
        self._free_slots = room
        if self._records_past:
            super().activate_past_recording()

    def model(self) -> Any:
        """The decoder that fills this cache; None if that is not known."""
        return self._model()

    def remember_model(self, decoder: nn.Module) -> None:
        """Says which decoder fills this cache, without keeping it alive."""
        self._model = ModelReference(decoder)

    @property
    def records_past(self) -> bool:
        """Whether drafted tokens may be taken back (assisted decoding): eviction then waits for the first crop."""
        return self._records_past

    def activate_past_recording(self) -> None:
        self._records_past = True
        super().activate_past_recording()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.layers:
            raise ValueError(
                "this model does not know LookaheadCache. Load a LOOKAHEAD_KV adapter into it with "
                "model.load_adapter(...), or, for a scorer that needs no adapter, call "
                "lkq_hf.prepare_model_for_eviction(model) once."
            )
        stored = self.layers[layer_idx].keys
        if stored is not None and stored.device != key_states.device:
            raise ValueError(
                f"this LookaheadCache holds layer {layer_idx} on {stored.device}, and the model computes it on "
                f"{key_states.device}: the model was moved after the cache had read. Move it back, or read the text "
                "again into a new LookaheadCache. A cache that was saved by save_pretrained is loaded to where the "
                "model is."
            )
        if self.park is not None:
            following = (layer for layer in self.layers[layer_idx + 1 :] if isinstance(layer, EvictedLayer))
            if (next_layer := next(following, None)) is not None:
                next_layer.fetch_ahead(key_states.shape[-2])  # copied while this layer works, and those between
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        # A forward announces its tokens here, and generate does so outside of what it compiles: here room is made.
        if self._has_static_storage and not torch.compiler.is_compiling() and not self._is_reading:
            self._reserve(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    @property
    def next_token_fits(self) -> bool:
        """Whether the next token goes into a free slot and needs no refresh before it, as far as the host knows."""
        refreshes = self.refresh_every is not None and self._since_reading >= 2 * self.refresh_every
        return self._free_slots > 0 and not refreshes

    def note_token(self) -> None:
        """Says that a token is written of which `next_token_fits`. Waits for nothing."""
        self._free_slots -= 1
        self._since_reading += 1

    def take_back(self, count: int) -> None:
        """Removes the last ``count`` tokens, written since storage last moved. Waits for nothing, unlike `crop`."""
        if count:
            torch._foreach_sub_([layer.filled for layer in self.layers], count)
            self._free_slots += count
            self._since_reading -= count

    def static_storage(self) -> list[int]:
        """Where everything lies that a decode with static shapes reads and writes, and the longest prefixes."""
        found = []
        for layer in self.layers:
            tensors = [layer.keys, layer.values, layer.filled, layer.offset]
            if (prefix := getattr(layer, "prefix", None)) is not None:
                tensors += [prefix.starts, prefix.lengths, prefix.pool.keys, prefix.pool.values]
                found.append(prefix.longest)
            found += [tensor.data_ptr() for tensor in tensors]
        return found

    def _reserve(self, query_length: int) -> None:
        """Makes room for a forward of ``query_length`` tokens, and, if that is a later prompt, for its answer."""
        tokens = query_length if query_length == 1 else query_length + (self.max_new_tokens or 0)
        if tokens > self._free_slots:
            layers = [layer for layer in self.layers if isinstance(layer, StaticStorage)]
            if tokens > min(layer.free_slots() for layer in layers):
                # All at once, so that a compiled decode is compiled again once.
                for layer in layers:
                    layer.grow(tokens)
            self._free_slots = min(layer.free_slots() for layer in layers)
        self._free_slots -= query_length
        self._since_reading += query_length

    def begin_eviction(self, decoder: Any, length: int) -> Eviction:
        """The eviction of a text of ``length`` tokens, for the layers to hand in their candidates."""
        if length < self._turn_end:
            # More is to be read, and then each head may turn out to deserve that many.
            return Eviction(self.keeps_after(length), "uniform", layers_in_all=len(self.evicted_layers()))
        if self.allocation == "profile":
            self._profile = profile_of(decoder)
        numbers = self._numbers_by_layer(length)
        budget, processes = self.entries_to_keep(length), divided_heads(decoder)
        layers = len(self.evicted_layers())
        return Eviction(budget, self.allocation, numbers, self.is_compileable, processes, layers)

    def _numbers_by_layer(self, length: int) -> dict[int, torch.Tensor] | None:
        """Entries that the profile gives each head of a text of ``length`` tokens; None without a profile.

        Raises:
            ValueError: the profile was measured on a model with another number of evicted layers.
        """
        if self._profile is None:
            return None
        layers = self.evicted_layers()
        if len(self._profile.heads) != len(layers):
            raise ValueError(
                f"the adapter's budget_profile has numbers for {len(self._profile.heads)} layers, and this model has "
                f"{len(layers)} that are evicted. It was measured on another model: measure it again with "
                "`lkq-hf profile`."
            )
        return dict(zip(layers, self._profile.numbers(self.entries_to_keep(length), length), strict=True))

    def pools(self) -> list[Pool]:
        """What an eviction may write into: with static shapes, what the last one wrote."""
        return list(self._used_pools()) if self.is_compileable else []

    def _used_pools(self) -> dict[Pool, None]:
        prefixes = (self.layers[index].prefix for index in self.evicted_layers())
        return dict.fromkeys(prefix.pool for prefix in prefixes if prefix is not None)

    def evict_to(self, prefixes: dict[int, Prefix], recent: int = 0, written: bool = False) -> None:
        """Replaces what the layers hold, but for the last ``recent`` tokens, by these.

        Args:
            prefixes: of each evicted layer.
            recent: tokens that stay behind them.
            written: whether static storage is so already, and only the host has to know.
        """
        for index, prefix in prefixes.items():
            if written:
                self.layers[index].note_prefix(prefix)
            else:
                self.layers[index].evict_to(prefix, recent)
        # How many there are now is asked for when they are needed, where that is not known.
        self._free_slots = min(layer.keys.shape[2] for layer in self.layers) - recent if written else 0
        self._since_reading = recent

    def defer(
        self,
        eviction: Eviction,
        tails: dict[int, tuple[torch.Tensor, torch.Tensor]],
        scores: dict[int, torch.Tensor],
        seen: int,
        mask: torch.Tensor | None,
    ) -> None:
        """Stores everything now and evicts at the next `crop`, which says what was only a draft.

        Args:
            eviction: to be carried out then.
            tails: for each layer all keys and values.
            scores: for each layer theirs.
            seen: length of the text.
            mask: ``[batch, seen]``, True for real tokens.
        """
        for index, tail in tails.items():
            self.layers[index].replace_tail(*tail, seen)
        self._deferred = _Deferred(eviction, scores, mask)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; of every layer, or, if one cannot, of none.

        Args:
            tokens_to_remove: minus the number of tokens to remove, or (older transformers) the length to crop to.

        Raises:
            ValueError: entries that the shorter text needs are gone.
        """
        for layer in self.layers:
            if hasattr(layer, "croppable"):
                layer.croppable(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.text.cut(int(self.get_seq_length()))
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            self._evict_deferred(deferred)

    def _evict_deferred(self, deferred: "_Deferred") -> None:
        seen = int(self.get_seq_length())
        scored = min(seen, next(iter(deferred.scores.values())).shape[-1])
        if self.entries_to_keep(scored) >= scored:
            return
        deferred.eviction.budget = self.entries_to_keep(scored)
        deferred.eviction.profile = self._numbers_by_layer(scored)
        mask = None if deferred.mask is None else deferred.mask[:, :scored]
        later = seen - scored
        for index, scores in deferred.scores.items():
            layer = self.layers[index]
            candidates = layer.candidates(layer.keys, layer.values, scored, mask)
            deferred.eviction.add(index, candidates, scores[..., :scored])
        self.evict_to(deferred.eviction.settle(scored), later)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._take_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_rows(lambda rows: rows[indices.to(rows.device)])

    def _take_rows(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.text.take_rows(choose)
        if self._deferred is not None:
            self._deferred = self._deferred.rows(choose)

    def reset(self) -> None:
        """Forgets everything that was read; the next prompt is compressed again."""
        self.layers = []
        self._deferred = None
        self.recorded_refresh = None
        self.text = ReadText()

    @property
    def batch(self) -> int:
        """Rows that are stored."""
        return self.layers[self.evicted_layers()[0]].keys.shape[0]

    @property
    def is_unsettled(self) -> bool:
        """Whether an eviction waits for the last piece of a text, or for drafted tokens to be accepted."""
        return self._deferred is not None or self._turn_is_under_way

    def end_restoring(self) -> None:
        """Says that all layers hold what a saved cache held."""
        self._free_slots = 0  # how many there are is asked for when they are needed
        self._since_reading = self.layers[self.evicted_layers()[0]].tail_length

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values, of the positions of those that an eviction has kept, and of states."""
        tails = (tensor for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None)
        states = sum(layer.states_nbytes for layer in self.layers if isinstance(layer, RecurrentLayer))
        return sum(tensor.nbytes for tensor in tails) + sum(pool.nbytes for pool in self._used_pools()) + states

    @property
    def entries_parked(self) -> int:
        """Entries of each KV head in main memory."""
        parked = self.layers[self.evicted_layers()[0]].parked if self.layers else None
        return 0 if parked is None else parked.length

    @property
    def parked_nbytes(self) -> int:
        """Bytes of the entries in main memory."""
        parked = (self.layers[index].parked for index in self.evicted_layers())
        return sum(entries.nbytes for entries in parked if entries is not None)

    def summary(self) -> dict[str, Any]:
        """What the cache holds.

        Returns:
            ``tokens_seen``; ``entries_stored``, the mean over KV heads of the evicted layers; ``entries_parked``, of
            each KV head in main memory; ``bytes``; ``bytes_parked``; ``bytes_without_eviction``, of the same text; and
            ``layers``, for each layer its ``entries`` (of each KV head, mean over the batch), the ``least``, ``mean``
            and ``most`` of these, and its bytes.
        """
        layers = [_layer_summary(layer) for layer in self.layers]
        heads = [entries for index in self.evicted_layers() for entries in layers[index]["entries"]]
        return {
            "tokens_seen": int(self.get_seq_length()),
            "entries_stored": sum(heads) / len(heads) if heads else 0,
            "entries_parked": self.entries_parked,
            "bytes": self.nbytes,
            "bytes_parked": self.parked_nbytes,
            "bytes_without_eviction": sum(row["bytes_without_eviction"] for row in layers),
            "layers": layers,
        }

    def __repr__(self) -> str:
        summary = self.summary()
        return (
            f"{type(self).__name__}(budget={self.budget}, scorer={self._scorer_in_use}, "
            f"allocation={self.allocation!r}, tokens_seen={summary['tokens_seen']}, "
            f"entries_stored={summary['entries_stored']:g}, "
            f"bytes={summary['bytes']:,} of {summary['bytes_without_eviction']:,})"
        )


@dataclass
class _Deferred:
    """An eviction that waits until drafted tokens are accepted or cropped."""

    eviction: Eviction
    scores: dict[int, torch.Tensor]
    mask: torch.Tensor | None

    def rows(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> "_Deferred":
        scores = {index: choose(layer) for index, layer in self.scores.items()}
        return replace(self, scores=scores, mask=None if self.mask is None else choose(self.mask))


def _layer_summary(layer: Any) -> dict[str, Any]:
    keys, values = layer.keys, layer.values
    states = layer.states_nbytes if isinstance(layer, RecurrentLayer) else 0
    if keys is None:
        return {"entries": [], "least": 0, "mean": 0, "most": 0, "bytes": states, "bytes_without_eviction": states}
    batch, heads = keys.shape[:2]
    entry = keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()
    size = keys.nbytes + values.nbytes
    if isinstance(layer, EvictedLayer):
        stored, whole = layer.entries_by_head(), int(layer.get_seq_length()) * batch * heads * entry
        if layer.prefix is not None:
            size += int(layer.prefix.lengths.sum()) * (entry + layer.prefix.pool.positions.element_size())
    else:
        stored, whole = [keys.shape[-2]] * heads, size  # a window loses nothing to eviction
    return {
        "entries": stored,
        "least": min(stored),
        "mean": sum(stored) / heads,
        "most": max(stored),
        "bytes": size + states,
        "bytes_without_eviction": whole + states,
    }


def profile_of(decoder: Any) -> BudgetProfile:
    """Numbers per head of the active adapter's config, whichever scorer chooses among the entries of a head.

    Raises:
        ValueError: the model has no adapter, or its config has no profile.
    """
    tokens = getattr(decoder, ADAPTER_ATTRIBUTE, None)
    if tokens is None:
        raise ValueError(
            'LookaheadCache(allocation="profile") takes its numbers per head from a LOOKAHEAD_KV adapter, and '
            f"{type(decoder).__name__} has none. Load one with model.load_adapter(...), or choose "
            'allocation="global", "layer" or "uniform".'
        )
    return tokens.budget_profile()


def check_allocation(allocation: str) -> str:
    """The allocation.

    Raises:
        ValueError: it is unknown.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}; choose one of {', '.join(ALLOCATIONS)}")
    return allocation


def _check_whole(name: str, tokens: int | None) -> int | None:
    if tokens is None:
        return None
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"{name} must be a number of tokens (int) or None, got {tokens!r}")
    if tokens < 1:
        raise ValueError(f"{name} must be at least 1, got {tokens}; pass None to do without")
    return tokens


def _check_park(park: str | None) -> str | None:
    if park is not None and park not in PLACES:
        raise ValueError(
            f"park must be one of {', '.join(map(repr, PLACES))}, or None to drop what is evicted, got {park!r}"
        )
    return park


def _check_budget(budget: int | float) -> int | float:
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(
            f"budget must be a number of tokens (int) or a fraction of the prompt (float), got {type(budget).__name__}"
        )
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"a budget in tokens must be at least 1, got {budget}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(
            f"a budget given as a float is a fraction of the prompt, above 0 and at most 1, got {budget}; "
            "pass an int for a number of tokens"
        )
    return budget
