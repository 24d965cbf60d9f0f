"""What answers lose when the cache is evicted: LookaheadCache against SnapKV, sinks + recent, random and the oracle.

    python benchmarks/texts.py debian-handbook_*.deb fortunes_*.deb --out test.jsonl.gz
    python benchmarks/eviction_quality.py --texts test.jsonl.gz \
        --adapter model_cards/smollm2-135m-instruct-lookahead --out benchmarks/results/eviction_quality

Three measurements, each with the full cache beside it:

1. *Likelihood*: the full cache's own greedy answer to prompts of three kinds (explain, summarise, continue) is scored
   under each evicted cache in one forward (teacher forcing): NLL, tokens matched, recall of the oracle's top-k (mean
   over KV heads; in results of before commit f72a096, of all entries).
2. *Planted facts*: answers are generated; the share of right ones, and how much of the full cache's share is kept.
3. *Agreement*: answers to questions over several paragraphs and summaries are generated and compared with the full
   cache's by word F1.

Prompts are read once for all scorers, by the evaluator of `lkq-hf evaluate eviction`. ``--small`` is a smoke test.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, NAMES, parser, real_model, save
from quality import AGREEMENT_TASKS, FACT_TASKS, Prompts
from tqdm import tqdm

from lkq_hf.evaluation.environment import digests, environment
from lkq_hf.evaluation.eviction import FULL, EvictionEvaluator, summarise
from lkq_hf.evaluation.tasks import Example
from lkq_hf.scoring import LookaheadScorer, RandomScorer, Scorer, SnapKVScorer, StreamingScorer

LIKELIHOOD_TASKS = ("explain", "summarise", "continue")
SUMS: dict[str, dict[str, Any]] = {
    f"sum-pool {width} (0.2)": {"kernel_size": width, "pooling": "sum", "neighbor_weight": 0.2} for width in (3, 5)
}
"""Weighted sums of neighboring scores, by name."""


def scorers(
    with_adapter: bool, lookahead_kernels: list[int], snapkv_kernels: list[int], snapkv_poolings: list[str]
) -> dict[str, Scorer]:
    methods: dict[str, Scorer] = {}
    if with_adapter:
        methods["lookahead, adapter's pooling"] = LookaheadScorer()
        for kernel in lookahead_kernels:
            name = f"lookahead, max-pool {kernel}" if kernel > 1 else "lookahead, no pooling"
            methods[name] = LookaheadScorer(kernel_size=kernel)
        methods |= {f"lookahead, {name}": LookaheadScorer(**pooling) for name, pooling in SUMS.items()}
    for kernel in snapkv_kernels:
        for pooling in snapkv_poolings if kernel > 1 else ["max"]:
            name = f"snapkv, {pooling}-pool {kernel}" if kernel > 1 else "snapkv, no pooling"
            methods[name] = SnapKVScorer(kernel_size=kernel, pooling=pooling)
    methods |= {f"snapkv, {name}": SnapKVScorer(**pooling) for name, pooling in SUMS.items()}
    methods["sinks + recent"] = StreamingScorer()
    methods["random"] = RandomScorer()
    return methods


def measure(evaluator: EvictionEvaluator, examples: list[Example], new_tokens: int, given: Any, title: str) -> Any:
    """Rows by cache, of prompts of one length; for the likelihood no cache but the full one answers."""
    answer = not title.startswith("likelihood")
    records: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(examples), given.batch_size), desc=title):
        records += evaluator.measure(examples[start : start + given.batch_size], new_tokens, answer)
    for record in records:
        record["task"] = title  # one table for all kinds of prompts
    found = {
        "full" if row["budget"] is None else f"{row['budget']}/{row['scorer']}": row for row in summarise(records)
    }
    full, rows = found["full"], {}
    for name, row in found.items():
        if answer:
            rows[name] = {"word_f1": row["word_f1"]}
            if "answer_match" in row:
                rows[name]["accuracy"] = row["answer_match"]
                if full["answer_match"]:
                    rows[name]["kept"] = row["answer_match"] / full["answer_match"]
        else:
            rows[name] = {"nll": row["nll"], "matched": row["token_agreement"], "recall": row.get("topk_recall", 1.0)}
    for budget in evaluator.budgets if not answer else ():
        here = {name: row for name, row in rows.items() if name.startswith(f"{budget}/")}
        best_snapkv = min(row["nll"] for name, row in here.items() if "snapkv" in name)
        for row in here.values():
            row["closes_gap"] = (best_snapkv - row["nll"]) / (best_snapkv - full["nll"])
    tokens = sum(len(record["caches"][FULL]["tokens"]) for record in records)
    return {"prompts": len(examples), "answer_tokens": tokens, "rows": rows}


def describe(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    files = [*arguments.texts, *([arguments.adapter] if arguments.adapter else [])]
    return {
        **environment(device),
        "model": NAMES.get(arguments.model, Path(arguments.model).name),
        "adapter": Path(arguments.adapter).name if arguments.adapter else None,
        "dtype": arguments.dtype,
        "allocation": arguments.allocation,
        "sha256": {Path(path).name: digest for path, digest in digests(files).items()},
        "seed": arguments.seed,
    }


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--texts", nargs="+", type=Path, required=True, help="documents as written by texts.py")
    options.add_argument("--source", default="debian-handbook", help="source of the texts of measurements 1 and 3")
    options.add_argument("--adapter", help="directory of a LOOKAHEAD_KV adapter; without it, only the others")
    options.add_argument("--model", default="smollm2", help="smollm2, gemma3, or a directory")
    options.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256])
    options.add_argument("--allocation", choices=("global", "layer", "uniform"), default="global")
    options.add_argument("--prompts", type=int, default=192, help="prompts of measurement 1")
    options.add_argument("--fact-prompts", type=int, default=64, help="prompts of each cell of measurement 2")
    options.add_argument("--agreement-prompts", type=int, default=64, help="prompts of each task of measurement 3")
    options.add_argument("--length", type=int, default=2048, help="tokens of the prompts of measurements 1 and 3")
    options.add_argument("--fact-lengths", nargs="+", type=int, default=[2048, 4096])
    options.add_argument("--answer-tokens", type=int, default=64)
    options.add_argument("--lookahead-kernels", nargs="+", type=int, default=[1, 3, 5, 7])
    options.add_argument("--snapkv-kernels", nargs="+", type=int, default=[1, 3, 5, 7])
    options.add_argument(
        "--only", choices=("likelihood", "facts", "agreement"), nargs="+", help="leave the others out"
    )
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--device", default=DEVICE)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--small", action="store_true", help="a few short prompts, to see that everything runs")
    given = options.parse_args()
    given.dtype = given.dtype or ("bfloat16" if given.device.startswith("cuda") else "float32")
    if given.small:
        given.prompts, given.fact_prompts, given.agreement_prompts = 3, 2, 2
        given.length, given.fact_lengths, given.budgets = 512, [512], [64]
        given.answer_tokens, given.lookahead_kernels, given.snapkv_kernels = 12, [1], [1, 7]
    given.only = given.only or ["likelihood", "facts", "agreement"]
    return given


def main() -> None:
    given = parse()
    started = time.monotonic()
    model, tokenizer = real_model(given.model, given.adapter, given.device, getattr(torch, given.dtype))
    prompts = Prompts(given.texts, tokenizer, given.source, given.seed)
    results: dict[str, Any] = {"about": describe(given, model.device), "seconds": 0.0, "measurements": {}}
    wide, narrow = (
        EvictionEvaluator(model, tokenizer, scorers(bool(given.adapter), *chosen), given.budgets, given.allocation)
        for chosen in (
            (given.lookahead_kernels, given.snapkv_kernels, ["max", "avg"]),
            # Generating takes much longer than scoring: fewer poolings.
            ([1, 3], given.snapkv_kernels, ["max"]),
        )
    )

    def keep(name: str, evaluator: EvictionEvaluator, examples: list[Example], new_tokens: int) -> None:
        """A run that is cut short keeps its finished measurements."""
        results["measurements"][name] = measure(evaluator, examples, new_tokens, given, name)
        results["seconds"] = time.monotonic() - started
        save(given.out, results)

    if "likelihood" in given.only:
        count = given.prompts // len(LIKELIHOOD_TASKS)
        examples = [each for kind in LIKELIHOOD_TASKS for each in prompts.open(kind, count, given.length)]
        keep(f"likelihood, {given.length} tokens", wide, examples, given.answer_tokens)
    for length in given.fact_lengths if "facts" in given.only else ():
        for kind in FACT_TASKS:
            examples, tokens = prompts.facts(kind, given.fact_prompts, length)
            keep(f"{kind}, {length} tokens", narrow, examples, tokens)
    for kind in AGREEMENT_TASKS if "agreement" in given.only else ():
        # Other prompts than those of the first measurement.
        examples = prompts.open(kind, given.agreement_prompts, given.length, shift=1)
        keep(f"agreement: {kind}, {given.length} tokens", narrow, examples, given.answer_tokens)


if __name__ == "__main__":
    main()
