"""What answers lose when the cache is evicted: LookaheadCache against SnapKV, sinks + recent, random and the oracle.

    python benchmarks/texts.py debian-handbook_*.deb fortunes_*.deb --out test.jsonl.gz
    python benchmarks/eviction_quality.py --texts test.jsonl.gz \
        --adapter model_cards/smollm2-135m-instruct-lookahead --out benchmarks/results/eviction_quality

Three measurements, each with the full cache beside it:

1. *Likelihood*: the full cache's own greedy answer to prompts of three kinds (explain, summarise, continue) is scored
   under each evicted cache in one forward (teacher forcing): NLL, tokens matched, recall of the oracle's top-k.
2. *Planted facts*: answers are generated; the share of right ones, and how much of the full cache's share is kept.
3. *Agreement*: answers to questions over several paragraphs and summaries are generated and compared with the full
   cache's by word F1.

Writes OUT.json; report.py makes the table and the picture. ``--small`` is a smoke test for a CPU.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, parser, real_model, save
from quality import AGREEMENT_TASKS, FACT_TASKS, Prompts, answer_rows
from tqdm import tqdm

from lkq_hf import LookaheadCache
from lkq_hf.evaluation.decoding import Answers, answer_greedily, score_answers
from lkq_hf.evaluation.environment import digests, environment
from lkq_hf.evaluation.metrics import load_metric
from lkq_hf.evaluation.prefill import (
    Prefill,
    ScoredAnswers,
    add_oracle,
    kept_entries,
    read_prompts,
    stack_caches,
)
from lkq_hf.evaluation.tasks import Example
from lkq_hf.scoring import LookaheadScorer, RandomScorer, Scorer, SnapKVScorer, StreamingScorer

LIKELIHOOD_TASKS = ("explain", "summarise", "continue")
ORACLE = "oracle"
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


class Bench:
    """One model and its scorers. Every batch of prompts is read once, for all scorers and budgets."""

    def __init__(self, arguments: argparse.Namespace):
        dtype = getattr(torch, arguments.dtype)
        self.model, self.tokenizer = real_model(arguments.model, arguments.adapter, arguments.device, dtype)
        self.budgets = arguments.budgets
        self.allocation = arguments.allocation
        self.batch_size = arguments.batch_size
        with_adapter = bool(arguments.adapter)
        self.methods = scorers(with_adapter, arguments.lookahead_kernels, arguments.snapkv_kernels, ["max", "avg"])
        # Generating takes much longer than scoring: fewer poolings.
        self.generating_methods = scorers(with_adapter, [1, 3], arguments.snapkv_kernels, ["max"])

    def read(self, examples: list[Example], methods: dict[str, Scorer], description: str) -> Iterator[Prefill]:
        """The prompts in batches. They have one length, so nothing is padded."""
        for start in tqdm(range(0, len(examples), self.batch_size), desc=description):
            batch = examples[start : start + self.batch_size]
            input_ids = torch.tensor([example["input_ids"] for example in batch], device=self.model.device)
            mask = torch.ones_like(input_ids)
            yield read_prompts(self.model, input_ids, mask, methods, self.budgets, self.allocation)

    def add_oracle(self, prefill: Prefill, answers: Answers) -> ScoredAnswers:
        return add_oracle(self.model, prefill, answers, self.budgets, self.allocation)

    def full_answers(self, prefill: Prefill, new_tokens: int) -> Answers:
        return answer_greedily(self.model, prefill.logits, prefill.mask, copy.deepcopy(prefill.full), new_tokens)

    def caches(self, prefill: Prefill, oracle: dict[int, LookaheadCache], budget: int) -> dict[str, LookaheadCache]:
        """By method; the oracle last."""
        return {name: cache for (name, size), cache in prefill.caches.items() if size == budget} | {
            ORACLE: oracle[budget]
        }


@torch.no_grad()
def likelihood(bench: Bench, examples: list[Example], new_tokens: int) -> dict[str, Any]:
    """Measurement 1."""
    nlls: dict[str, list[list[float]]] = {}
    tokens: dict[str, list[list[int]]] = {}
    recalls: dict[str, list[torch.Tensor]] = {}
    reference: list[list[int]] = []

    def record(row: str, scored: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor) -> None:
        nll, chosen = scored
        nlls.setdefault(row, []).extend(values[m].tolist() for values, m in zip(nll, mask, strict=True))
        tokens.setdefault(row, []).extend(values[m].tolist() for values, m in zip(chosen, mask, strict=True))

    for prefill in bench.read(examples, bench.methods, "likelihood"):
        answers = bench.full_answers(prefill, new_tokens)
        reference.extend(answers.tokens())
        full = bench.add_oracle(prefill, answers)
        record("full", (full.nll, full.chosen), answers.mask)
        for budget in bench.budgets:
            best = kept_entries(full.oracle[budget])
            for name, cache in bench.caches(prefill, full.oracle, budget).items():
                recalls.setdefault(f"{budget}/{name}", []).append(_recall(kept_entries(cache), best))
                scored = score_answers(bench.model, prefill.logits, prefill.mask, cache, answers)
                record(f"{budget}/{name}", scored, answers.mask)

    agreement, gap = load_metric("token_agreement"), load_metric("nll_gap")
    rows = {
        row: {
            "nll": gap.compute(predictions=nlls[row], references=nlls["full"])["nll"],
            "matched": agreement.compute(predictions=tokens[row], references=reference)["token_agreement"],
            "recall": torch.cat(recalls[row]).mean().item() if row in recalls else 1.0,
        }
        for row in nlls
    }
    for budget in bench.budgets:
        here = [name for name in rows if name.startswith(f"{budget}/")]
        best_snapkv = min(rows[name]["nll"] for name in here if "snapkv" in name)
        for name in here:
            rows[name]["closes_gap"] = (best_snapkv - rows[name]["nll"]) / (best_snapkv - rows["full"]["nll"])
    return {"prompts": len(examples), "answer_tokens": sum(map(len, reference)), "rows": rows}


def _recall(kept: dict[int, torch.Tensor], best: dict[int, torch.Tensor]) -> torch.Tensor:
    """Share of the oracle's entries that were kept, ``[batch]``; both bool ``[batch, kv_heads, length]`` by layer."""
    both = sum((kept[layer] & best[layer]).sum((1, 2)) for layer in best)
    return (both / sum(best[layer].sum((1, 2)) for layer in best)).cpu()


@torch.no_grad()
def generated(bench: Bench, examples: list[Example], new_tokens: int, description: str) -> dict[str, Any]:
    """Measurements 2 (examples with a reference) and 3: answers as each cache gives them."""
    texts: dict[str, list[str]] = {}

    def record(row: str, answers: list[list[int]]) -> None:
        texts.setdefault(row, []).extend(bench.tokenizer.batch_decode(answers, skip_special_tokens=True))

    for prefill in bench.read(examples, bench.generating_methods, description):
        answers = bench.full_answers(prefill, new_tokens)
        record("full", answers.tokens())
        oracle = bench.add_oracle(prefill, answers).oracle
        for budget in bench.budgets:
            # All methods answer together: a step costs little more for all of them than for one.
            caches = bench.caches(prefill, oracle, budget)
            repeated = [tensor.repeat(len(caches), 1) for tensor in (prefill.logits, prefill.mask)]
            own = answer_greedily(bench.model, *repeated, stack_caches(list(caches.values())), new_tokens).tokens()
            for index, name in enumerate(caches):
                size = len(prefill.logits)
                record(f"{budget}/{name}", own[index * size : (index + 1) * size])
    rows = answer_rows(texts, [example["reference"] for example in examples])
    return {"prompts": len(examples), "rows": rows}


def describe(arguments: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    files = [*arguments.texts, *([arguments.adapter] if arguments.adapter else [])]
    return {
        **environment(bench.model.device),
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct" if arguments.model == "smollm2" else Path(arguments.model).name,
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
    options.add_argument("--batch-size", type=int, default=64)
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
    bench = Bench(given)
    prompts = Prompts(given.texts, bench.tokenizer, given.source, given.seed)
    results: dict[str, Any] = {"about": describe(given, bench), "seconds": 0.0, "measurements": {}}

    def keep(name: str, found: dict[str, Any]) -> None:
        """A run that is cut short keeps its finished measurements."""
        results["measurements"][name] = found
        results["seconds"] = time.monotonic() - started
        save(given.out, results)

    if "likelihood" in given.only:
        count = given.prompts // len(LIKELIHOOD_TASKS)
        examples = [each for kind in LIKELIHOOD_TASKS for each in prompts.open(kind, count, given.length)]
        keep(f"likelihood, {given.length} tokens", likelihood(bench, examples, given.answer_tokens))
    for length in given.fact_lengths if "facts" in given.only else ():
        for kind in FACT_TASKS:
            examples, tokens = prompts.facts(kind, given.fact_prompts, length)
            keep(f"{kind}, {length} tokens", generated(bench, examples, tokens, f"{kind}, {length} tokens"))
    for kind in AGREEMENT_TASKS if "agreement" in given.only else ():
        name = f"agreement: {kind}, {given.length} tokens"
        # Other prompts than those of the first measurement.
        examples = prompts.open(kind, given.agreement_prompts, given.length, shift=1)
        keep(name, generated(bench, examples, given.answer_tokens, name))


if __name__ == "__main__":
    main()
