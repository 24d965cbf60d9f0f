"""Which entries of one prompt each scorer keeps."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from lkq_hf.cache import LookaheadCache, prepare_model_for_eviction
from lkq_hf.evaluation.decoding import Answers, answer_greedily
from lkq_hf.evaluation.positions import check_positions
from lkq_hf.evaluation.prefill import Prefill, add_oracle, cache_bytes, entries_of, kept_entries, read_prompts
from lkq_hf.scoring import get_scorer

ORACLE = "oracle"
FULL = "full cache"


@dataclass(frozen=True)
class Inspection:
    """What was kept of one prompt.

    Attributes:
        model: name of the model, without its owner or directory.
        budget: entries kept per KV head, on average.
        pieces: the text of each token; joined, they are the prompt.
        layers: indices of the compressed layers in the model.
        kept: for each scorer, the first of which is the one of interest, bool ``[layers, kv_heads, length]``.
        full_bytes, kept_bytes: keys and values of the prompt, whole and evicted.
        attention: mean attention of the full cache's answer to each entry, float32 ``[layers, kv_heads, length]``;
            None unless the oracle was asked for.
        answers: the answer over each cache, the full one first; empty unless the oracle was asked for.
        adapter: name of the adapter, if there is one.
        allocation: how the entries are shared out among heads.
    """

    model: str
    budget: int
    pieces: list[str]
    layers: list[int]
    kept: dict[str, torch.Tensor]
    full_bytes: int
    kept_bytes: int
    attention: torch.Tensor | None = None
    answers: dict[str, str] = field(default_factory=dict)
    adapter: str | None = None
    allocation: str = "global"

    @property
    def heads(self) -> int:
        """KV heads over all compressed layers."""
        kept = next(iter(self.kept.values()))
        return kept.shape[0] * kept.shape[1]

    def counts(self, scorer: str) -> torch.Tensor:
        """How many heads keep each token, int64 ``[length]``."""
        return self.kept[scorer].sum((0, 1))

    def entries(self, scorer: str) -> torch.Tensor:
        """How many entries each head keeps, int64 ``[layers, kv_heads]``."""
        return self.kept[scorer].sum(-1)

    def overlap(self, scorer: str, other: str) -> torch.Tensor:
        """Share of the entries that ``other`` keeps which ``scorer`` keeps too, ``[layers]``."""
        both = self.kept[scorer] & self.kept[other]
        return both.sum((1, 2)) / self.kept[other].sum((1, 2))

    def attention_kept(self, scorer: str) -> torch.Tensor | None:
        """Share of the answer's attention to the prompt that falls on kept entries, ``[layers]``."""
        if self.attention is None:
            return None
        share = (self.attention * self.kept[scorer]).sum(-1) / self.attention.sum(-1)
        return share.mean(-1)


@torch.no_grad()
def inspect_eviction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    budget: int | float,
    scorers: Sequence[str] = ("lookahead", "snapkv"),
    oracle: bool = False,
    max_new_tokens: int = 64,
    adapter: str | None = None,
    add_special_tokens: bool = False,
    allocation: str = "global",
) -> Inspection:
    """Reads a prompt once and records what each scorer keeps of it.

    Args:
        model: a causal language model, with its lookahead adapter if the lookahead scorer is asked for.
        tokenizer: its (fast) tokenizer.
        prompt: the text as the model reads it, after the chat template.
        budget: entries to keep per KV head on average (int), or a fraction of the prompt's length (float between 0 and
            1).
        scorers: their names, the one of interest first.
        oracle: also answer the prompt with every cache, and record what the full cache's answer attends to.
        max_new_tokens: longest answer, in tokens.
        adapter: name of the adapter, for the record.
        add_special_tokens: whether the tokenizer puts its own tokens around the prompt.
        allocation: how entries are shared out among heads, the same for every scorer.

    Raises:
        ValueError: an unknown allocation, or "profile" and no adapter that has one; the prompt is not longer than the
            budget; no scorer or an unknown one; or the tokenizer knows no character offsets.
    """
    if not scorers:
        raise ValueError("no scorers were given: expected at least one name")
    ids, pieces = _tokenize(prompt, tokenizer, add_special_tokens)
    entries = entries_of(budget, len(ids))
    if entries >= len(ids):
        raise ValueError(
            f"a budget of {entries} entries evicts nothing from a prompt of {len(ids)} tokens: choose a smaller "
            "budget or a longer prompt"
        )
    check_positions(model.config, len(ids), max_new_tokens if oracle else 0)
    prepare_model_for_eviction(model)
    input_ids = torch.tensor([ids], device=model.device)
    mask = torch.ones_like(input_ids)
    named = {name: get_scorer(name) for name in scorers}
    prefill = read_prompts(model, input_ids, mask, named, [entries], allocation)
    full_bytes = cache_bytes(prefill.full)
    caches = {name: prefill.caches[name, entries] for name in scorers}
    kept_bytes = cache_bytes(caches[scorers[0]])
    kept = {name: _as_mask(cache) for name, cache in caches.items()}
    attention, answers = None, {}
    if oracle:
        own = _answer(model, prefill, copy.deepcopy(prefill.full), max_new_tokens)
        scored = add_oracle(model, prefill, own, [entries], allocation)
        caches[ORACLE] = scored.oracle[entries]
        kept[ORACLE] = _as_mask(caches[ORACLE])
        attention = torch.stack([scored.attention[layer][0] for layer in sorted(scored.attention)]).cpu()
        found = {FULL: own} | {name: _answer(model, prefill, cache, max_new_tokens) for name, cache in caches.items()}
        texts = tokenizer.batch_decode([each.tokens()[0] for each in found.values()], skip_special_tokens=True)
        answers = dict(zip(found, texts, strict=True))
    return Inspection(
        model=Path(model.config.name_or_path or type(model).__name__).name,
        budget=entries,
        pieces=pieces,
        layers=sorted(kept_entries(prefill.caches[scorers[0], entries])),
        kept=kept,
        full_bytes=full_bytes,
        kept_bytes=kept_bytes,
        attention=attention,
        answers=answers,
        adapter=adapter,
        allocation=allocation,
    )


def _answer(model: PreTrainedModel, prefill: Prefill, cache: Cache, max_new_tokens: int) -> Answers:
    return answer_greedily(model, prefill.logits, prefill.mask, cache, max_new_tokens)


def _as_mask(cache: LookaheadCache) -> torch.Tensor:
    """``[layers, kv_heads, length]``, True for kept entries."""
    kept = kept_entries(cache)
    return torch.stack([kept[layer][0] for layer in sorted(kept)]).cpu()


def _tokenize(
    prompt: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> tuple[list[int], list[str]]:
    """Token ids, and the text from each token's predecessor's end to its own."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"showing a prompt's tokens needs a fast tokenizer, got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    encoded = tokenizer(prompt, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    pieces, done = [], 0
    for _, end in encoded["offset_mapping"]:
        # A character of several tokens belongs to the first of them; an added token has no text.
        pieces.append(prompt[done : max(done, end)])
        done = max(done, end)
    if pieces:
        pieces[-1] += prompt[done:]
    return ids, pieces
