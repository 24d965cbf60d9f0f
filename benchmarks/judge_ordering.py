"""Does the judge that chooses a checkpoint order scorers as a test of planted facts does?

    python benchmarks/judge_ordering.py --texts test.jsonl.gz --out benchmarks/results/judge_ordering.json

Scorers that differ in how well they choose stand for adapters: the shipped adapter with several poolings and means,
and SnapKV. Each is judged (`lkq_hf.evaluation.judge`) on prompts of the training's kinds with the model's own answers,
and tested on planted facts in other words, for which it has to generate. The results are these numbers, and Spearman's
rank correlation of each of the judge's with the share of facts found.
"""

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import describe, parser, real_model, save, settings

from lkq_hf import shipped_adapter
from lkq_hf.evaluation.decoding import answer_greedily
from lkq_hf.evaluation.judge import AnswerJudge
from lkq_hf.evaluation.prefill import read_prompts, stack_caches
from lkq_hf.evaluation.tasks import build_task
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


def ranks(values: list[float]) -> torch.Tensor:
    """Equal values share the mean of their ranks."""
    found = torch.tensor(values, dtype=torch.float64)
    return (found[:, None] > found).sum(1) + ((found[:, None] == found).sum(1) - 1) / 2


def correlation(one: list[float], other: list[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", type=Path, required=True)
    options.add_argument("--length", type=int, default=768)
    options.add_argument("--judged", type=int, default=24, help="prompts that are judged")
    options.add_argument("--tested", type=int, default=12, help="prompts with planted facts of each kind")
    options.add_argument("--answer", type=int, default=24)
    options.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128])
    given = options.parse_args()
    model, tokenizer = real_model(adapter=shipped_adapter())
    documents = read_documents([given.texts])
    mix = PromptMix(min_length=given.length, max_length=given.length, seed=5)
    prompts = [{"input_ids": each["input_ids"]} for each in build_prompts(documents, tokenizer, given.judged, mix)]
    with tempfile.TemporaryDirectory() as directory:
        targets = generate_targets(model, prompts, directory, given.answer, batch_tokens=8192)
        rows = list(usable_targets([targets], cut_loops=True))
    judged = AnswerJudge(rows, given.budgets, batch_tokens=2 * given.length).compare(model, SCORERS)
    found: dict[str, dict[int, list[bool]]] = {name: defaultdict(list) for name in SCORERS}
    full: list[bool] = []
    for number in range(given.tested):
        for kind in ("needle", "needle_multi_key"):
            task = build_task(kind, Corpus(documents, tokenizer))
            example = task.example(number, given.length)
            ids = torch.tensor([example["input_ids"]], device=model.device)
            mask = torch.ones_like(ids)
            prefill = read_prompts(model, ids, mask, SCORERS, given.budgets)
            expected = example["reference"] or []

            def right(logits: Any, mask: Any, cache: Any, task: Any = task, expected: Any = expected) -> list[bool]:
                answers = answer_greedily(model, logits, mask, cache, task.max_new_tokens).tokens()
                return [all(part in tokenizer.decode(tokens) for part in expected) for tokens in answers]

            for budget in given.budgets:
                caches = stack_caches([prefill.caches[name, budget] for name in SCORERS])
                repeated = (each.repeat(len(SCORERS), 1) for each in (prefill.logits, mask))
                for name, one in zip(SCORERS, right(*repeated, caches), strict=True):
                    found[name][budget].append(one)
            full += right(prefill.logits, mask, prefill.full)
    scorers = {}
    for name, numbers in judged.items():
        shares = {f"found@{budget}": sum(each) / len(each) for budget, each in found[name].items()}
        scorers[name] = {**numbers, "found": sum(shares.values()) / len(shares), **shares}
    tested = [row["found"] for row in scorers.values()]
    agreement = {
        measure: correlation([sign * row[measure] for row in scorers.values()], tested)
        for measure, sign in (("lost", -1), ("same", 1))
    }
    results = {"environment": describe(), "settings": settings(given), "facts": len(full)}
    results |= {"full cache": sum(full) / len(full), "scorers": scorers, "correlation with facts found": agreement}
    save(given.out, results)
    print(agreement)


if __name__ == "__main__":
    main()
