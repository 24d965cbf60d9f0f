"""What answers lose when the cache is evicted: each scorer at each budget against the full cache."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkq_hf.cache import prepare_model_for_eviction
from lkq_hf.cache.evicted import check_allocation, profile_of
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.evaluation.decoding import Answers, answer_greedily, pad_left, score_answers
from lkq_hf.evaluation.environment import environment
from lkq_hf.evaluation.journal import Journal
from lkq_hf.evaluation.metrics import load_metric
from lkq_hf.evaluation.positions import check_positions
from lkq_hf.evaluation.prefill import (
    add_oracle,
    cache_bytes,
    entries_of,
    kept_entries,
    read_prompts,
    stack_caches,
)
from lkq_hf.evaluation.tasks import Example, QuestionAnswering, Task
from lkq_hf.hub import load_adapter
from lkq_hf.scoring import SCORERS, Scorer, get_scorer

ORACLE = "oracle"
FULL = "full cache"

Record = dict[str, Any]
"""One prompt: its task, its reference, and what each cache made of it (``"caches"``, by `cell_name`)."""

Row = dict[str, Any]
"""One line of the results: a task, a length, a scorer, a budget, and their metrics."""


def cell_name(scorer: str, budget: int | float) -> str:
    return f"{scorer}/{budget}"


class EvictionEvaluator:
    """Answers prompts with the full cache and with every evicted one.

    Args:
        model: a causal language model, with its lookahead adapter if the lookahead scorer is asked for. It is prepared
            for eviction if it is not yet.
        tokenizer: its tokenizer.
        scorers: names of scorers, "oracle" (which attends to the full cache's own answer) among them; or scorers, by
            names of your own, beside which the oracle is measured.
        budgets: entries to keep per KV head on average (int), or fractions of a prompt's length (float between 0 and
            1).
        allocation: how they are shared out among heads, the same for every scorer, as in
            `LookaheadCache`.

    Raises:
        ValueError: an unknown scorer or allocation, no scorers or budgets, or "profile" and no adapter that has one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scorers: Sequence[str] | Mapping[str, Scorer] = ("lookahead", "snapkv", "streaming", ORACLE),
        budgets: Sequence[int | float] = (64, 128, 256),
        allocation: str = "global",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        if isinstance(scorers, Mapping):
            self._scorers, self.scorers = dict(scorers), [*scorers, ORACLE]
        else:
            self.scorers = check_scorers(scorers)
            self._scorers = {name: get_scorer(name) for name in self.scorers if name != ORACLE}
        self.budgets = check_budgets(budgets)
        self.allocation = check_allocation(allocation)
        if allocation == "profile":
            profile_of(get_decoder(model))  # told before hours of work
        prepare_model_for_eviction(model)

    @torch.no_grad()
    def measure(self, examples: Sequence[Example], max_new_tokens: int, answer: bool = True) -> list[Record]:
        """Answers a batch of prompts, padded on the left where their lengths differ.

        Args:
            examples: the prompts.
            max_new_tokens: longest answer, in tokens.
            answer: whether each cache also gives an answer of its own, which takes most of the time.

        Returns:
            One record for each prompt, as JSON.

        Raises:
            ValueError: a budget is not below the length of the shortest prompt.
        """
        pad = self.tokenizer.pad_token_id or 0
        ids, mask = pad_left([example["input_ids"] for example in examples], pad)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        entries = {budget: entries_of(budget, ids.shape[1]) for budget in self.budgets}
        different = sorted(set(entries.values()))
        prefill = read_prompts(self.model, ids, mask, self._scorers, different, self.allocation)
        full_bytes = cache_bytes(prefill.full)
        answers = answer_greedily(self.model, prefill.logits, mask, copy.deepcopy(prefill.full), max_new_tokens)
        full = add_oracle(self.model, prefill, answers, different, self.allocation)
        records = [
            {"task": e["kind"], "length": len(e["input_ids"]), "document": e["document"], "reference": e["reference"]}
            for e in examples
        ]
        cells = {FULL: self._describe(answers, full.nll, full.chosen, answers, full_bytes)}
        # The scorers of one budget answer together: a step costs little more for all of them than for one.
        count = len(self.scorers)
        logits, masks = prefill.logits.repeat(count, 1), mask.repeat(count, 1)
        given = Answers(answers.ids.repeat(count, 1), answers.mask.repeat(count, 1))
        for budget in self.budgets:
            oracle = full.oracle[entries[budget]]
            caches = [oracle if name == ORACLE else prefill.caches[name, entries[budget]] for name in self.scorers]
            nll, chosen = score_answers(self.model, logits, masks, stack_caches(caches), given)
            own = answer_greedily(self.model, logits, masks, stack_caches(caches), max_new_tokens) if answer else None
            for index, (name, cache) in enumerate(zip(self.scorers, caches, strict=True)):
                here = slice(index * len(examples), (index + 1) * len(examples))
                part = None if own is None else Answers(own.ids[here], own.mask[here])
                rows = self._describe(part, nll[here], chosen[here], answers, cache_bytes(cache))
                kept = kept_entries(cache)
                recall, mass = _attention(kept, kept_entries(oracle), full.attention)
                for prompt, row in enumerate(rows):
                    row |= {"topk_recall": recall[prompt], "retained_attention_mass": mass[prompt]}
                    row["entries_by_head"] = [kept[layer][prompt].sum(-1).tolist() for layer in sorted(kept)]
                cells[cell_name(name, budget)] = rows
        return [
            record | {"caches": {name: rows[index] for name, rows in cells.items()}}
            for index, record in enumerate(records)
        ]

    def _describe(
        self, own: Answers | None, nll: torch.Tensor, chosen: torch.Tensor, answers: Answers, size: int
    ) -> list[Record]:
        """What one cache made of each prompt: its own answer, if there is one, and how it sees the full cache's."""
        rows: list[Record] = [
            {"nll": nll[index][mask].tolist(), "chosen": chosen[index][mask].tolist(), "kv_bytes": size // len(nll)}
            for index, mask in enumerate(answers.mask)
        ]
        if own is not None:
            texts = self.tokenizer.batch_decode(own.tokens(), skip_special_tokens=True)
            for row, text, tokens in zip(rows, texts, own.tokens(), strict=True):
                row |= {"answer": text, "tokens": tokens}
        return rows


def _attention(
    kept: dict[int, torch.Tensor], best: dict[int, torch.Tensor], attention: dict[int, torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Shares of the oracle's entries and of the answer's attention that were kept, by prompt: means over KV heads.

    These are the metrics ``topk_recall`` and ``retained_attention_mass``.

    Args:
        kept: bool ``[batch, kv_heads, length]`` by layer.
        best: what the oracle keeps, likewise.
        attention: the attention of the answer, float ``[batch, kv_heads, length]`` by layer.
    """
    own, oracle, mass = (torch.cat([each[layer] for layer in sorted(kept)], dim=1) for each in (kept, best, attention))
    mass = mass.clamp(min=0.0).double()
    recall = (own & oracle).sum(-1) / oracle.sum(-1).double()
    share = (mass * own).sum(-1) / mass.sum(-1)
    return recall.mean(-1).tolist(), share.mean(-1).tolist()


def check_scorers(scorers: Sequence[str]) -> list[str]:
    """The names, each once.

    Raises:
        ValueError: none, or an unknown one.
    """
    known = [*SCORERS, ORACLE]
    unknown = [name for name in scorers if name not in known]
    if unknown or not scorers:
        found = f"unknown scorer {unknown[0]!r}" if unknown else "no scorers were given"
        raise ValueError(f"{found}; choose from {', '.join(known)}")
    return list(dict.fromkeys(scorers))


def check_budgets(budgets: Sequence[int | float]) -> list[int | float]:
    """The budgets, each once, in rising order, numbers of entries before fractions.

    Raises:
        ValueError: none, or one that is neither a positive whole number nor a fraction between 0 and 1.
    """
    if not budgets or not all(_is_budget(budget) for budget in budgets):
        raise ValueError(
            "expected at least one budget, each a positive number of entries or a fraction of the prompt between 0 "
            f"and 1, got {list(budgets)}"
        )
    return sorted(set(budgets), key=lambda budget: (isinstance(budget, float), budget))


def _is_budget(budget: int | float) -> bool:
    return 0 < budget < 1 if isinstance(budget, float) else budget >= 1


def check_lengths(
    budgets: Sequence[int | float], lengths: Sequence[int], tasks: Sequence[Task], model: PreTrainedModel
) -> None:
    """Checks that every budget evicts something from every prompt, and that the model has room for all answers.

    Raises:
        ValueError: a budget is not below every length, or a prompt and its answer are longer than the model's
            positions.
    """
    entries = max(entries_of(budget, min(lengths)) for budget in budgets)
    if entries >= min(lengths):
        raise ValueError(
            f"a budget of {entries} entries evicts nothing from prompts of {min(lengths)} tokens: choose smaller "
            "budgets or longer prompts"
        )
    check_positions(model.config, max(lengths), max(task.max_new_tokens for task in tasks))


def evaluate_eviction(
    evaluator: EvictionEvaluator,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    examples: int,
    journal: Journal,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Runs tasks, and writes ``results.json`` beside the journal.

    Batches are the same however many processes share them (``accelerate launch``), so the results are too. Finished
    batches are in the journal: a stopped run goes on after them.

    Args:
        evaluator: model, scorers and budgets.
        tasks: what to ask.
        lengths: tokens of the prompts.
        examples: prompts of each task and length.
        journal: of this run, in a directory that all processes see.
        batch_size: prompts in a batch.

    Returns:
        ``{"arguments", "environment", "rows", "records"}``; see `summarise` for the rows.

    Raises:
        ValueError: a budget is not below every length, a length is beyond the model's positions, a count below 1, or
            a task that the documents do not allow.
    """
    if min(examples, batch_size) < 1 or not tasks or not lengths:
        raise ValueError("expected at least one task, one length, one example and a batch size of at least 1")
    check_lengths(evaluator.budgets, lengths, tasks, evaluator.model)
    for task in tasks:
        for length in lengths:
            task.example(0, length)  # what the documents do not allow is told before hours of other tasks
    state = PartialState()
    batches = [
        (task, length, range(start, min(start + batch_size, examples)))
        for task in tasks
        for length in lengths
        for start in range(0, examples, batch_size)
    ]
    names = [f"{task.kind}-{length}-{indices.start:05d}" for task, length, indices in batches]
    mine = list(zip(names, batches, strict=True))[state.process_index :: state.num_processes]
    with tqdm(total=sum(len(batch[2]) for _, batch in mine), unit="prompt", disable=state.process_index > 0) as bar:
        for name, (task, length, indices) in mine:
            bar.set_description(f"{task.kind}, {length} tokens")
            if name not in journal:
                prompts = [task.example(index, length) for index in indices]
                journal.write(name, evaluator.measure(prompts, task.max_new_tokens))
            bar.update(len(indices))
    state.wait_for_everyone()
    records = [record for name in names for record in journal.read(name)]
    return {
        "arguments": journal.arguments,
        "environment": environment(evaluator.model.device, state.num_processes),
        "rows": summarise(records),
        "records": records,
    }


def summarise(records: Iterable[Record]) -> list[Row]:
    """The metrics of each task, length, scorer and budget.

    Every row holds ``task``, ``length``, ``scorer``, ``budget`` as it was asked for, the same in ``entries`` of a
    prompt of this length (both None for the full cache), ``examples``, and

    - ``answer_match``: share of the expected strings in the answers, where the task has any;
    - ``word_f1``, ``agreed_prefix``: generated answers against the full cache's;
    - ``nll``, ``nll_gap``, ``perplexity``, ``token_agreement``: the full cache's answers under this cache;
    - ``topk_recall``, ``retained_attention_mass``: what was kept of what the full cache's answer attends to;
    - ``kv_bytes``: of keys and values of one prompt, after its prefill;
    - ``entries_by_head``: what each KV head keeps of a prompt on average, ``[evicted layers][kv_heads]``, and
      ``entries_least`` and ``entries_most`` of these.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["length"]), []).append(record)
    rows = []
    metrics = _Metrics()
    for (task, length), group in groups.items():
        for name in group[0]["caches"]:
            scorer, _, stated = name.partition("/")
            budget = json.loads(stated) if stated else None
            about = {
                "task": task,
                "length": length,
                "scorer": scorer,
                "budget": budget,
                "entries": None if budget is None else entries_of(budget, length),
            }
            rows.append(about | {"examples": len(group)} | metrics.compute(group, name))
    return rows


class _Metrics:
    """The metric modules, loaded once."""

    def __init__(self) -> None:
        self.answer_match = load_metric("answer_match", keep_in_memory=True)
        self.word_f1 = load_metric("word_f1", keep_in_memory=True)
        self.agreement = load_metric("token_agreement", keep_in_memory=True)
        self.likelihood = evaluate.combine([load_metric("nll_gap"), load_metric("perplexity")])

    def compute(self, group: list[Record], name: str) -> dict[str, float]:
        cells = [record["caches"][name] for record in group]
        full = [record["caches"][FULL] for record in group]
        result: dict[str, float] = {}
        reference = [cell["tokens"] for cell in full]
        if all("answer" in cell for cell in cells):
            texts = [cell["answer"] for cell in cells]
            if all(record["reference"] for record in group):
                references = [record["reference"] for record in group]
                # A question's answers are alternatives; the strings of the other tasks are all asked for.
                match = "any" if group[0]["task"] == QuestionAnswering.kind else "all"
                result |= self.answer_match.compute(predictions=texts, references=references, match=match)
            result |= self.word_f1.compute(predictions=texts, references=[cell["answer"] for cell in full])
            own = self.agreement.compute(predictions=[cell["tokens"] for cell in cells], references=reference)
            result["agreed_prefix"] = own["agreed_prefix"]
        forced = self.agreement.compute(predictions=[cell["chosen"] for cell in cells], references=reference)
        result["token_agreement"] = forced["token_agreement"]
        likelihood = self.likelihood.compute(
            predictions=[cell["nll"] for cell in cells], references=[cell["nll"] for cell in full]
        )
        result |= {key: likelihood[key] for key in ("nll", "nll_gap", "perplexity")}
        for key in ("topk_recall", "retained_attention_mass", "kv_bytes"):
            values = [cell[key] for cell in cells if key in cell]
            result |= {key: sum(values) / len(values)} if values else {}
        return result | _entries([cell["entries_by_head"] for cell in cells if "entries_by_head" in cell])


def _entries(every: list[list[list[int]]]) -> dict[str, Any]:
    """Where the budget went: means over prompts, by layer and head."""
    if not every:
        return {}
    heads = [[sum(counts) / len(every) for counts in zip(*layer, strict=True)] for layer in zip(*every, strict=True)]
    flat = [count for layer in heads for count in layer]
    return {"entries_by_head": heads, "entries_least": min(flat), "entries_most": max(flat)}


def load_evaluator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | Path | None,
    scorers: Sequence[str],
    budgets: Sequence[int | float],
    allocation: str = "global",
) -> EvictionEvaluator:
    """An evaluator of a model with its adapter.

    Raises:
        ValueError: the lookahead scorer without an adapter; see also `EvictionEvaluator`.
    """
    if "lookahead" in check_scorers(scorers) and adapter is None:
        raise ValueError("the lookahead scorer needs an adapter: pass one, or leave lookahead out of the scorers")
    if adapter is not None:
        load_adapter(model, adapter)
    return EvictionEvaluator(model, tokenizer, scorers, budgets, allocation)
