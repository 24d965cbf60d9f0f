"""Does the judge that chooses a checkpoint order scorers as a test of planted facts does?

    python benchmarks/judge_ordering.py --texts test.jsonl.gz --out benchmarks/results/judge_ordering.json

Scorers that differ in how well they choose stand for adapters: the shipped adapter with several poolings and means,
and SnapKV. Each is judged (`lkq_hf.evaluation.judge`) on prompts of the training's kinds with the model's own answers,
and tested on planted facts in other words, for which it has to generate. The results are these numbers, and Spearman's
rank correlation of each of the judge's with the share of facts found.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from real_models import load_smollm2

from lkq_hf import shipped_adapter
from lkq_hf.evaluation.decoding import answer_greedily
from lkq_hf.evaluation.judge import AnswerJudge
from lkq_hf.evaluation.prefill import read_prompts, stack_caches
from lkq_hf.evaluation.tasks import build_task
from lkq_hf.hub import load_adapter
from lkq_hf.scoring import LookaheadScorer, SnapKVScorer
from lkq_hf.text.documents import read_documents
from lkq_hf.text.passages import Corpus
from lkq_hf.training import PromptMix, build_prompts, generate_targets
from lkq_hf.training.data import usable_targets

SCORERS = {
    "as shipped": LookaheadScorer(),
    "no pooling": LookaheadScorer(kernel_size=1),
    "max-pool 7": LookaheadScorer(kernel_size=7),
    "average-pool 5": LookaheadScorer(kernel_size=5, pooling="avg"),
    "mean over tokens": LookaheadScorer(row_power=1.0),
    "power 8 over tokens": LookaheadScorer(row_power=8.0),
    "SnapKV, average-pool 3": SnapKVScorer(kernel_size=3, pooling="avg"),
    "SnapKV, no pooling": SnapKVScorer(kernel_size=1),
}
FACTS = ("needle", "needle_multi_key")


def ranks(values: list[float]) -> torch.Tensor:
    """Equal values share the mean of their ranks."""
    found = torch.tensor(values, dtype=torch.float64)
    return (found[:, None] > found).sum(1) + ((found[:, None] == found).sum(1) - 1) / 2


def correlation(one: list[float], other: list[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--judged", type=int, default=24, help="prompts that are judged")
    parser.add_argument("--tested", type=int, default=12, help="prompts with planted facts of each kind")
    parser.add_argument("--answer", type=int, default=24)
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128])
    options = parser.parse_args()
    model, tokenizer = load_smollm2()
    documents = read_documents([options.texts])
    corpus = Corpus(documents, tokenizer)
    mix = PromptMix(min_length=options.length, max_length=options.length, seed=5)
    prompts = [
        {"input_ids": prompt["input_ids"]} for prompt in build_prompts(documents, tokenizer, options.judged, mix)
    ]
    with tempfile.TemporaryDirectory() as directory:
        targets = generate_targets(model, prompts, directory, options.answer, batch_tokens=8192)
        rows = list(usable_targets([targets], cut_loops=True))
    load_adapter(model, shipped_adapter())
    judged = AnswerJudge(rows, options.budgets, batch_tokens=2 * options.length).compare(model, SCORERS)
    found: dict[str, dict[int, list[bool]]] = {name: defaultdict(list) for name in SCORERS}
    full: list[bool] = []
    for number in range(options.tested):
        for kind in FACTS:
            task = build_task(kind, corpus)
            example = task.example(number, options.length)
            ids = torch.tensor([example["input_ids"]])
            mask = torch.ones_like(ids)
            prefill = read_prompts(model, ids, mask, SCORERS, options.budgets)
            expected = example["reference"] or []

            def right(tokens: list[int], expected: list[str] = expected) -> bool:
                return all(part in tokenizer.decode(tokens) for part in expected)

            for budget in options.budgets:
                caches = stack_caches([prefill.caches[name, budget] for name in SCORERS])
                count = len(SCORERS)
                own = answer_greedily(
                    model, prefill.logits.repeat(count, 1), mask.repeat(count, 1), caches, task.max_new_tokens
                )
                for name, tokens in zip(SCORERS, own.tokens(), strict=True):
                    found[name][budget].append(right(tokens))
            own = answer_greedily(model, prefill.logits, mask, prefill.full, task.max_new_tokens)
            full.append(right(own.tokens()[0]))
            write(options, judged, found, full)


def write(options: argparse.Namespace, judged: dict[str, Any], found: dict[str, Any], full: list[bool]) -> None:
    settings = {name: value for name, value in vars(options).items() if name not in ("texts", "out")}
    rows: dict[str, dict[str, float]] = {}
    for name, numbers in judged.items():
        shares = {f"found@{budget}": sum(each) / len(each) for budget, each in found[name].items()}
        rows[name] = {**numbers, "found": sum(shares.values()) / len(shares), **shares}
    tested = [row["found"] for row in rows.values()]
    content = {
        "environment": describe(), "settings": settings, "facts": len(full), "full cache": sum(full) / len(full),
        "scorers": rows,
        "correlation with facts found": {
            measure: correlation([sign * row[measure] for row in rows.values()], tested)
            for measure, sign in (("lost", -1), ("same", 1))
        },
    }  # fmt: skip
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
