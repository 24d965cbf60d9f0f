"""What happens around each attention of a forward that a LookaheadCache takes part in.

A *reading* forward reads a prompt, a later turn or a piece of one: after each layer's attention its entries are
scored, and at the end of the forward all layers are cut to the budget. In any other forward the new tokens are stored
behind what there is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lkq_hf.attention import AttentionCall, start_attending, thread_state
from lkq_hf.cache.attend import attend_over, attend_to_text
from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.eviction import Eviction
from lkq_hf.cache.layers import EvictedLayer, LastQueries
from lkq_hf.cache.modules import attention_modules
from lkq_hf.cache.padding import left_padding
from lkq_hf.cache.recurrent import read_apart
from lkq_hf.scoring import PrefillAttention, Scorer


def layer_of(cache: EvictedCache, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> EvictedLayer | None:
    """The evicted layer that returned these keys and values: the module's own, or one whose entries it shares."""
    index = getattr(module, "layer_idx", None)
    layers = cache.layers
    if index is not None and index < len(layers):
        own = layers[index]
        if isinstance(own, EvictedLayer):
            if torch.compiler.is_compiling() or own.returned(key, value):
                return own
        elif own.keys is not None and own.keys is key:  # a sliding window
            return None
    evicted = (each for each in layers if isinstance(each, EvictedLayer) and not each.returns_prefix)
    return next((each for each in evicted if each.returned(key, value)), None)


def _queries(call: AttentionCall) -> LastQueries:
    """The queries of a forward, and what of its arguments a scorer needs with them."""
    return LastQueries(call.query, call.scaling, call.options.get("softcap"), call.options.get("s_aux"))


@dataclass
class Decoding:
    """A forward whose tokens are stored behind what there is."""

    decoder: PreTrainedModel
    cache: EvictedCache
    text_mask: torch.Tensor | None
    stop_attending: Callable[[], None] = field(init=False)

    def start(self) -> None:
        self.stop_attending = start_attending(self.decoder, self.attend)

    def attend(self, call: AttentionCall) -> Any:
        layer = layer_of(self.cache, call.module, call.key, call.value)
        if layer is None:
            return attend_over(call, None, self.text_mask)
        count = self.cache.observed_queries or self.cache.queries_of_pieces
        if count and not torch.compiler.is_compiling():
            if self.cache.queries_of_pieces and not self.cache.continues_pieces:
                layer.last_queries = None  # of the turn before
            layer.observe(_queries(call), count)
        return attend_over(call, layer.attended_prefix, self.text_mask, layer.returns_prefix)

    def finish(self, output: Any) -> Any:
        self.stop_attending()
        return output

    def abandon(self) -> None:
        self.stop_attending()


@dataclass
class Reading:
    """A forward that reads tokens, scores all entries and evicts.

    Attributes:
        decoder: the stack of layers.
        cache: what is filled.
        scorer: bound to the decoder.
        batch: rows.
        new_length: tokens that are read; 0 for a pass of the appended tokens alone.
        suffix_length: tokens that are appended for this forward only.
        text_mask: ``[batch, text]`` bool over everything read up to the end of this forward; None without padding.
        eviction: where the layers hand in their candidates.
        trim: cuts the appended tokens off the forward's output.
        recent: the last tokens of the tail, which are not up for eviction.
    """

    decoder: PreTrainedModel
    cache: EvictedCache
    scorer: Scorer
    batch: int
    new_length: int
    suffix_length: int
    text_mask: torch.Tensor | None
    eviction: Eviction
    trim: Callable[[Any], Any]
    recent: int = 0
    _tails: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _scores: dict[int, torch.Tensor] = field(default_factory=dict)
    _last_queries: dict[int, LastQueries] = field(default_factory=dict)
    _padding: torch.Tensor | None = field(init=False, default=None)
    _orders: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    stop_attending: Callable[[], None] = field(init=False)

    def start(self) -> None:
        self._seen = int(self.cache.get_seq_length())
        for layer in self.cache.layers:
            if hasattr(layer, "begin_reading"):
                layer.begin_reading(self.suffix_length)
        self.cache.layers[self.cache.evicted_layers()[0]].fetch_ahead(self.new_length + self.suffix_length)
        if self.text_mask is not None and self.cache.park is not None:
            self._padding = left_padding(self.text_mask)
        self.stop_attending = start_attending(self.decoder, self.attend)
        thread_state.recur = self.recur if self.suffix_length else None
        thread_state.lookahead_length = self.suffix_length if self.scorer.uses_adapter else 0
        thread_state.token_shape = (self.batch, self.new_length + self.suffix_length)

    def attend(self, call: AttentionCall) -> Any:
        layer = layer_of(self.cache, call.module, call.key, call.value)
        index: int = call.module.layer_idx  # type: ignore[assignment]
        own: Any = self.cache.layers[index] if index < len(self.cache.layers) else None
        if layer is None and isinstance(own, EvictedLayer):
            raise NotImplementedError(
                f"the attention of layer {index} of {type(self.decoder).__name__} could not be observed: it changes "
                "keys or values after the cache has returned them. Generate with DynamicCache for this model."
            )
        if layer is None:
            return attend_over(call, None, self.text_mask)
        self._refuse_own_masks(call)
        if layer.reads_text and layer.seen_before:
            output = attend_to_text(call, layer.seen_before, self.text_mask, self._padding)
        else:
            output = attend_over(call, layer.attended_prefix, self.text_mask, layer.returns_prefix)
        if layer is own:
            queries, new_length = self._with_last_piece(index, layer, _queries(call))
            tail = layer.read_tail(call.key, call.value)
            attended = (call.key, call.value) if layer.returns_prefix else None
            self._hand_in(index, layer, queries, tail, attended, new_length)
        return output

    def _with_last_piece(self, index: int, layer: EvictedLayer, queries: LastQueries) -> tuple[LastQueries, int]:
        """Queries of a piece of a turn, behind the last ones of the piece before, and how many are of the text."""
        count, length = self.cache.queries_of_pieces, self.new_length
        if count == 0:
            return queries, length
        if self.cache.continues_pieces and layer.last_queries is not None:
            before = layer.last_queries.query
            queries = queries._replace(query=torch.cat([before, queries.query], dim=2))
            length += before.shape[2]
        self._last_queries[index] = queries._replace(query=queries.query[:, :, :length][:, :, -count:].clone())
        return queries, length

    def _refuse_own_masks(self, call: AttentionCall) -> None:
        """Refuses attention that hides or weighs entries by itself: what is evicted would change what it makes.

        Raises:
            NotImplementedError: the mask differs from head to head.
        """
        if isinstance(call.mask, torch.Tensor) and call.mask.ndim == 4 and call.mask.shape[1] > 1:
            raise NotImplementedError(
                f"{type(call.module).__name__} of {type(self.decoder).__name__} makes a mask for each head, from all "
                "that the cache holds: it would be another one after an eviction. Generate with DynamicCache for this "
                "model."
            )

    def recur(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a module with a recurrent state returns, as if no tokens were appended to those before them."""
        layer = self.cache.layers[module.layer_idx]  # type: ignore[index]
        return read_apart(layer, forward, args, kwargs, self.suffix_length)

    def without_forward(self) -> None:
        """Evicts by what the last tokens' queries attend to, for scorers that append no tokens."""
        self._seen = int(self.cache.get_seq_length())
        modules: dict[Any, Any] = {module.layer_idx: module for module in attention_modules(self.decoder)}
        for index in self.cache.evicted_layers():
            layer = self.cache.layers[index]
            layer.begin_reading(0)
            key, value = layer.behind_read(layer.keys[:, :, :0], layer.values[:, :, :0])
            attended = None
            if layer.returns_prefix:
                entries = layer.candidates(key, value, key.shape[2], None)
                attended = modules[index].expand_kv(entries.keys, entries.values)
            queries = layer.last_queries or LastQueries(key[:, :, :0], 1.0)
            self._hand_in(index, layer, queries, (key, value), attended, queries.query.shape[2])
        self._settle()

    def _hand_in(
        self,
        index: int,
        layer: EvictedLayer,
        queries: LastQueries,
        tail: tuple[torch.Tensor, torch.Tensor],
        attended: tuple[torch.Tensor, torch.Tensor] | None,
        new_length: int,
    ) -> None:
        """Scores one layer, right after its attention.

        Args:
            index: of the layer.
            layer: of the cache.
            queries: the first ``new_length`` are of tokens of the text.
            tail: keys and values as the cache holds them, of what is behind the prefix and of appended tokens.
            attended: those that the model makes of them and of the prefix; None where it takes them as they are.
            new_length: how many these are.
        """
        length = tail[0].shape[2] - self.suffix_length
        candidates = layer.candidates(*tail, length, self.text_mask, self._order(tail[0].device))
        count = candidates.positions.shape[-1]
        scored_keys, scored_values = attended or (candidates.keys, candidates.values)
        scores = self.scorer.score(
            PrefillAttention(
                query=queries.query,
                key=scored_keys,
                value=scored_values,
                length=count,
                suffix_length=self.suffix_length,
                budget=self.eviction.budget,
                scaling=queries.scaling,
                softcap=queries.softcap,
                sinks=queries.sinks,
                mask=candidates.one_mask_for_all_heads(),
                layer_index=index,
                new_length=new_length,
            )
        )
        if attended is not None:  # one score for the whole token
            scores = scores.mean(1, keepdim=True)
        if self.cache.records_past:
            # Which of these tokens are only drafts will be said by the next crop.
            self._tails[index] = tail[0][:, :, :length].clone(), tail[1][:, :, :length].clone()
            self._scores[index] = scores
            return
        if layer.parked is not None:
            layer.park(tail[0][:, :, :length], tail[1][:, :, :length])
        if self.recent:
            candidates, scores = candidates.without_last(self.recent), scores[..., : count - self.recent]
        self.eviction.add(index, candidates, scores)

    def _order(self, device: torch.device) -> torch.Tensor:
        """Places of the text, int32, the same tensor for all layers on ``device``."""
        order = self._orders.get(device)
        if order is None:
            order = torch.arange(self._seen + self.new_length, dtype=torch.int32, device=device)
            self._orders[device] = order
        return order

    def finish(self, output: Any) -> Any:
        """Cuts the layers to the budget, and the appended tokens off the output."""
        handed_in = [*self.eviction.layers, *self._tails]
        if missed := [index for index in self.cache.evicted_layers() if index not in handed_in]:
            self.abandon()
            raise NotImplementedError(
                f"the attention of layers {missed} of {type(self.decoder).__name__} could not be observed, so "
                "their cache cannot be compressed. Generate with DynamicCache for this model."
            )
        try:
            self._settle()
        except BaseException:
            self.abandon()
            raise
        self._stop()
        return self.trim(output)

    def _settle(self) -> None:
        seen = self._seen + self.new_length
        # Nothing to settle where it is put off.
        prefixes = {} if self._tails else self.eviction.settle(seen - self.recent, self.cache.pools())
        for layer in self.cache.layers:
            if hasattr(layer, "end_reading"):
                layer.end_reading()
        if self._tails:
            self.cache.defer(self.eviction, self._tails, self._scores, seen, self.text_mask)
        else:
            self.cache.evict_to(prefixes, self.recent)
        for index, queries in self._last_queries.items():
            self.cache.layers[index].last_queries = queries if self.cache.expects_piece else None

    def _stop(self) -> None:
        self.stop_attending()
        thread_state.recur = None
        thread_state.lookahead_length = 0

    def abandon(self) -> None:
        """Puts everything back as it was before the forward."""
        self._stop()
        for layer in self.cache.layers:
            if hasattr(layer, "abandon_reading"):
                layer.abandon_reading()
        self.cache.text.cut(self._seen)
        if self._seen == 0:
            self.cache.reset()
