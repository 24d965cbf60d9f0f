"""One prefill, many caches: what every scorer at every budget would have kept of the same prompts.

Reading a long prompt costs far more than all that follows. The activations of a prompt do not depend on what is kept
of it, so one forward fills the full cache and every evicted one, layer by layer.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lkq_hf.attention import observe_attention
from lkq_hf.cache import LookaheadCache
from lkq_hf.cache.layers import Candidates, EvictedLayer
from lkq_hf.cache.prefix import stack_prefixes
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.compat import pass_cache
from lkq_hf.evaluation.decoding import Answers, score_answers
from lkq_hf.kernels.lookahead_scores import lookahead_scores
from lkq_hf.scoring import OracleScorer, PrefillAttention, Scorer

Cell = tuple[str, int]
"""Name of a scorer, and a budget in entries per KV head."""


@dataclass(frozen=True)
class Prefill:
    """Prompts that were read once.

    Attributes:
        input_ids, mask: ``[batch, length]``; the mask is 1 for real tokens, with padding on the left.
        logits: ``[batch, vocabulary]`` after the prompts.
        full: the full cache.
        caches: for each scorer and budget what ``LookaheadCache(budget, scorer)`` holds after these prompts.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    logits: torch.Tensor
    full: Cache
    caches: dict[Cell, LookaheadCache]


class _Recorder(Scorer):
    """Fills a cache for each cell while the prompt passes. Scorers that append a suffix must append the same."""

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        budgets: Sequence[int],
        decoder: PreTrainedModel,
        length: int,
        allocation: str,
    ) -> None:
        self.scorers = dict(scorers)
        self.uses_adapter = any(scorer.uses_adapter for scorer in scorers.values())
        self.full = DynamicCache(config=decoder.config)
        self.caches = {
            (name, budget): LookaheadCache(budget, scorer, allocation=allocation, evict_later_turns=False)
            for budget in budgets
            for name, scorer in scorers.items()
        }
        self.evictions = {}
        for cell, cache in self.caches.items():
            cache.build_layers(decoder.config)
            self.evictions[cell] = cache.begin_eviction(decoder, length)

    def bind(self, decoder: nn.Module) -> Scorer:
        self.scorers = {name: scorer.bind(decoder) for name, scorer in self.scorers.items()}
        return self

    def suffix(self, decoder: nn.Module) -> torch.Tensor | None:
        every = {name: scorer.suffix(decoder) for name, scorer in self.scorers.items()}
        found = {name: suffix for name, suffix in every.items() if suffix is not None}
        first = next(iter(found.values()), None)
        if first is not None and not all(torch.equal(suffix, first) for suffix in found.values()):
            raise ValueError(f"the scorers {', '.join(found)} append different tokens to the prompt: use one of them")
        return first

    def suffix_per_layer(self, decoder: nn.Module) -> torch.Tensor | None:
        every = (scorer.suffix_per_layer(decoder) for scorer in self.scorers.values())
        return next((rows for rows in every if rows is not None), None)

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        key, value, length = attention.key, attention.value, attention.length
        self.full.update(key[:, :, :length], value[:, :, :length], attention.layer_index)
        candidates = _prompt_entries(key, value, length, attention.mask)
        for (name, budget), eviction in self.evictions.items():
            # Some scorers look at the budget.
            scores = self.scorers[name].score(replace(attention, budget=budget))
            eviction.add(attention.layer_index, candidates, scores)
        return torch.zeros(*key.shape[:2], length, device=key.device)

    def finish(self, length: int) -> None:
        """Cuts every cache to its budget, after prompts of ``length`` tokens."""
        for cell, eviction in self.evictions.items():
            self.caches[cell].evict_to(eviction.settle(length))

    def take_bounded_layers(self, passed: LookaheadCache) -> None:
        """Layers with a sliding window, which are not scored, are the same in every cache."""
        for index, layer in enumerate(passed.layers):
            if not isinstance(layer, EvictedLayer):
                for cache in (self.full, *self.caches.values()):
                    cache.layers[index] = copy.deepcopy(layer)


def _prompt_entries(key: torch.Tensor, value: torch.Tensor, length: int, mask: torch.Tensor | None) -> Candidates:
    return EvictedLayer().candidates(key, value, length, mask)


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    scorers: Mapping[str, Scorer],
    budgets: Sequence[int],
    allocation: str = "global",
) -> Prefill:
    """Reads a batch of prompts once, into the full cache and one evicted cache for each scorer and budget.

    Args:
        model: a causal language model, prepared for eviction (`lkq_hf.prepare_model_for_eviction`, or by its
            adapter).
        input_ids, mask: ``[batch, length]``, padded on the left.
        scorers: by name; those that append tokens to the prompt must append the same (so not the oracle: see
            `add_oracle`).
        budgets: entries to keep per KV head, each below the length of the shortest prompt.
        allocation: how they are shared out among heads, as in `LookaheadCache`.

    Raises:
        ValueError: no budget or one that is not below the length of the shortest prompt, or two scorers that append
            different tokens.
    """
    shortest = int(mask.sum(-1).min())
    if not budgets or max(budgets) >= shortest:
        raise ValueError(
            f"budgets must be below the length of the shortest prompt, {shortest} tokens, so that something is "
            f"evicted; got {list(budgets)}"
        )
    recorder = _Recorder(scorers, budgets, get_decoder(model), input_ids.shape[1], allocation)
    passed = LookaheadCache(budget=1, scorer=recorder, allocation="uniform")
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        **pass_cache(passed),
        use_cache=True,
        logits_to_keep=1,
    )
    recorder.finish(input_ids.shape[1])
    recorder.take_bounded_layers(passed)
    return Prefill(input_ids, mask, output.logits[:, -1], recorder.full, recorder.caches)


@dataclass(frozen=True)
class ScoredAnswers:
    """The full cache's answers, and what they attend to.

    Attributes:
        answers: the answers.
        nll, chosen: see `score_answers`; both ``[batch, length]``.
        attention: for each compressed layer the mean attention of the answer to each prompt entry, float32
            ``[batch, kv_heads, length]``, minus infinity on padding.
        oracle: for each budget what ``LookaheadCache(budget, OracleScorer(answers))`` holds after the prompts.
    """

    answers: Answers
    nll: torch.Tensor
    chosen: torch.Tensor
    attention: dict[int, torch.Tensor]
    oracle: dict[int, LookaheadCache]


@torch.no_grad()
def add_oracle(
    model: PreTrainedModel, prefill: Prefill, answers: Answers, budgets: Sequence[int], allocation: str = "global"
) -> ScoredAnswers:
    """Scores the answers with the full cache, and fills the oracle's caches from what they attend to.

    This costs one forward of the answers. They are appended to ``prefill.full``.
    """
    decoder = get_decoder(model)
    mask = None if bool(prefill.mask.all()) else prefill.mask.bool()
    length = prefill.mask.shape[1]
    scorer = OracleScorer(answers.ids, answers.mask)
    caches = {
        budget: LookaheadCache(budget, scorer, allocation=allocation, evict_later_turns=False) for budget in budgets
    }
    evictions = {}
    for budget, cache in caches.items():
        cache.build_layers(decoder.config)
        evictions[budget] = cache.begin_eviction(decoder, length)
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, EvictedLayer):
                cache.layers[index] = copy.deepcopy(prefill.full.layers[index])
    compressed = set(next(iter(caches.values())).evicted_layers())
    attention: dict[int, torch.Tensor] = {}

    def observe(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> None:
        index: int = module.layer_idx  # type: ignore[assignment]
        if index not in compressed:
            return
        scaling = options.get("scaling")
        scores = lookahead_scores(
            query,
            key,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            mask=mask,
            row_mask=answers.mask,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        attention[index] = scores
        candidates = _prompt_entries(key, value, length, mask)
        for eviction in evictions.values():
            eviction.add(index, candidates, scores)

    with observe_attention(decoder, observe):
        nll, chosen = score_answers(model, prefill.logits, prefill.mask, prefill.full, answers)
    for budget, eviction in evictions.items():
        caches[budget].evict_to(eviction.settle(length))
    return ScoredAnswers(answers, nll, chosen, attention, caches)


def entries_of(budget: int | float, length: int) -> int:
    """Entries that ``LookaheadCache(budget)`` keeps per KV head of a prompt of ``length`` tokens."""
    return LookaheadCache(budget).entries_to_keep(length)


def stack_caches(caches: Sequence[LookaheadCache]) -> LookaheadCache:
    """One cache that holds a copy of several along the batch, so that one forward serves them all.

    Args:
        caches: of one model, with the same budget, after prompts of the same length.
    """
    stacked = copy.deepcopy(caches[0])
    for index, layer in enumerate(stacked.layers):
        if layer.is_initialized:
            layer.keys = torch.cat([cache.layers[index].keys for cache in caches])
            layer.values = torch.cat([cache.layers[index].values for cache in caches])
    prefixes = stack_prefixes([{i: cache.layers[i].prefix for i in cache.evicted_layers()} for cache in caches])
    for index, prefix in prefixes.items():
        stacked.layers[index].prefix = prefix
    return stacked


def kept_entries(cache: LookaheadCache) -> dict[int, torch.Tensor]:
    """For each evicted layer which tokens each head keeps, bool ``[batch, kv_heads, length]``."""
    found = {index: cache.layers[index].kept() for index in cache.evicted_layers()}
    return {index: kept for index, kept in found.items() if kept is not None}


def cache_bytes(cache: Cache) -> int:
    """Bytes of the stored keys and values."""
    if isinstance(cache, LookaheadCache):
        return cache.nbytes
    layers: list[Any] = cache.layers
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None)
