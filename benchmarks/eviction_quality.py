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

Writes OUT.json and OUT.md. ``--small`` is a smoke test for a CPU.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from real_models import smollm2_directory
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lkq_hf import LookaheadCache, prepare_model_for_eviction
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
from lkq_hf.evaluation.tasks import Corpus, Example, build_task
from lkq_hf.scoring import LookaheadScorer, RandomScorer, Scorer, SnapKVScorer, StreamingScorer
from lkq_hf.text.documents import read_documents

LIKELIHOOD_TASKS = ("explain", "summarise", "continue")
FACT_TASKS = ("needle", "needle_multi_key")
AGREEMENT_TASKS = ("paragraph_question", "summarise")
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
        directory = arguments.model or smollm2_directory()
        dtype = getattr(torch, arguments.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(arguments.device).eval()
        if arguments.adapter:
            self.model.load_adapter(arguments.adapter)
        prepare_model_for_eviction(self.model)
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
    match, f1 = load_metric("answer_match"), load_metric("word_f1")
    references = [example["reference"] for example in examples]
    rows: dict[str, dict[str, float]] = {}
    for row, found in texts.items():
        rows[row] = f1.compute(predictions=found, references=texts["full"])
        if all(references):
            accuracy = match.compute(predictions=found, references=references)["answer_match"]
            rows[row]["accuracy"] = accuracy
            if rows["full"]["accuracy"]:
                rows[row]["kept"] = accuracy / rows["full"]["accuracy"]
    return {"prompts": len(examples), "rows": rows}


def describe(arguments: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    files = [*arguments.texts, *([arguments.adapter] if arguments.adapter else [])]
    return {
        **environment(bench.model.device),
        "model": bench.model.config._name_or_path if arguments.model else "HuggingFaceTB/SmolLM2-135M-Instruct",
        "adapter": Path(arguments.adapter).name if arguments.adapter else None,
        "dtype": arguments.dtype,
        "allocation": arguments.allocation,
        "sha256": {Path(path).name: digest for path, digest in digests(files).items()},
        "seed": arguments.seed,
    }


def table(budgets: list[int], methods: list[str], rows: dict[str, dict[str, float]], columns: dict[str, str]) -> str:
    columns = {key: title for key, title in columns.items() if any(key in row for row in rows.values())}
    lines = [
        "| budget | method | " + " | ".join(columns.values()) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    keys = [("full", "none", "full cache")]
    keys += [(f"{budget}/{name}", str(budget), name) for budget in budgets for name in methods]
    keys = [key for key in keys if key[0] in rows]
    for key, budget, name in keys:
        values = (f"{rows[key][column]:.3f}" if column in rows[key] else "" for column in columns)
        lines.append(f"| {budget} | {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def report(results: dict[str, Any], bench: Bench) -> str:
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    hardware = about["hardware"]["name"]
    parts = [
        "# Quality of answers over an evicted cache",
        f"{about['model']}, adapter: {about['adapter']}. {hardware}, {about['dtype']}; {versions}. "
        f"Allocation of the budget, of all scorers: {about['allocation']}. "
        f"{results['seconds']:.0f} s.",
    ]
    titles = {
        "nll": "NLL of the full cache's answer",
        "matched": "tokens matched",
        "recall": "recall of the oracle's top-k",
        "closes_gap": "gap closed from the best SnapKV to the full cache",
        "accuracy": "right answers",
        "kept": "share of the full cache's right answers",
        "word_f1": "word F1 against the full cache's answer",
    }
    for name, measured in results["measurements"].items():
        parts.append(f"## {name} ({measured['prompts']} prompts)")
        parts.append(table(bench.budgets, [*bench.methods, ORACLE], measured["rows"], titles))
    return "\n\n".join(parts) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path, required=True, help="documents as written by texts.py")
    parser.add_argument("--source", default="debian-handbook", help="source of the texts of measurements 1 and 3")
    parser.add_argument("--adapter", help="directory of a LOOKAHEAD_KV adapter; without it, only the others")
    parser.add_argument("--model", help="directory of another model than SmolLM2-135M-Instruct")
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--allocation", choices=("global", "layer", "uniform"), default="global")
    parser.add_argument("--prompts", type=int, default=192, help="prompts of measurement 1")
    parser.add_argument("--fact-prompts", type=int, default=64, help="prompts of each cell of measurement 2")
    parser.add_argument("--agreement-prompts", type=int, default=64, help="prompts of each task of measurement 3")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompts of measurements 1 and 3")
    parser.add_argument("--fact-lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--lookahead-kernels", nargs="+", type=int, default=[1, 3, 5, 7])
    parser.add_argument("--snapkv-kernels", nargs="+", type=int, default=[1, 3, 5, 7])
    parser.add_argument("--only", choices=("likelihood", "facts", "agreement"), nargs="+", help="leave the others out")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="where to write, without extension")
    parser.add_argument("--small", action="store_true", help="a few short prompts, to see that everything runs")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    if arguments.small:
        arguments.prompts, arguments.fact_prompts, arguments.agreement_prompts = 3, 2, 2
        arguments.length, arguments.fact_lengths, arguments.budgets = 512, [512], [64]
        arguments.answer_tokens, arguments.lookahead_kernels, arguments.snapkv_kernels = 12, [1], [1, 7]
    arguments.only = arguments.only or ["likelihood", "facts", "agreement"]
    return arguments


def main() -> None:
    arguments = parse()
    started = time.monotonic()
    bench = Bench(arguments)
    documents = read_documents(arguments.texts)
    everything = Corpus(documents, bench.tokenizer)
    chosen = [document for document in documents if document.get("source") == arguments.source]
    if not chosen:
        sources = sorted({document["source"] for document in documents})
        raise SystemExit(f"no document has the source {arguments.source!r}: choose one of {sources}")
    book = Corpus(chosen, bench.tokenizer)
    measurements: dict[str, Any] = {}

    def save() -> str:
        """Writes what there is: a run that is cut short keeps its finished measurements."""
        results = {
            "about": describe(arguments, bench),
            "seconds": time.monotonic() - started,
            "measurements": measurements,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        text = report(results, bench)
        arguments.out.with_suffix(".md").write_text(text)
        return text

    if "likelihood" in arguments.only:
        examples = [
            example
            for kind in LIKELIHOOD_TASKS
            for example in build_task(kind, book, arguments.seed).examples(arguments.prompts // 3, arguments.length)
        ]
        measurements[f"likelihood, {arguments.length} tokens"] = likelihood(bench, examples, arguments.answer_tokens)
        save()
    if "facts" in arguments.only:
        for length in arguments.fact_lengths:
            for kind in FACT_TASKS:
                task = build_task(kind, everything, arguments.seed)
                examples = list(task.examples(arguments.fact_prompts, length))
                name = f"{kind}, {length} tokens"
                measurements[name] = generated(bench, examples, task.max_new_tokens, name)
                save()
    if "agreement" in arguments.only:
        for kind in AGREEMENT_TASKS:
            # Other prompts than those of the first measurement.
            task = build_task(kind, book, arguments.seed + 1)
            examples = list(task.examples(arguments.agreement_prompts, arguments.length))
            name = f"agreement: {kind}, {arguments.length} tokens"
            measurements[name] = generated(bench, examples, arguments.answer_tokens, name)
    print(save())


if __name__ == "__main__":
    main()
