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
import gzip
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import lkq_hf
from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.evaluation.metrics import load_metric
from lkq_hf.evaluation.models import smollm2_directory
from lkq_hf.evaluation.tasks import Corpus, Example, build_task
from lkq_hf.scoring import (
    LookaheadScorer,
    OracleScorer,
    PrefillAttention,
    RandomScorer,
    Scorer,
    SnapKVScorer,
    StreamingScorer,
)

LIKELIHOOD_TASKS = ("explain", "summarise", "continue")
FACT_TASKS = ("needle", "needle_multi_key")
AGREEMENT_TASKS = ("paragraph_question", "summarise")

Methods = dict[str, Callable[["Answers"], Scorer]]


@dataclass
class Answers:
    """The full cache's greedy answers to one batch: ``ids`` and ``mask`` are ``[batch, length]``, ending with EOS."""

    ids: torch.Tensor
    mask: torch.Tensor


def scorers(
    with_adapter: bool, lookahead_kernels: list[int], snapkv_kernels: list[int], snapkv_poolings: list[str]
) -> Methods:
    methods: Methods = {}
    if with_adapter:
        methods["lookahead, adapter's pooling"] = lambda _: LookaheadScorer()
        for kernel in lookahead_kernels:
            name = f"lookahead, max-pool {kernel}" if kernel > 1 else "lookahead, no pooling"
            methods[name] = lambda _, kernel=kernel: LookaheadScorer(kernel_size=kernel)
    for kernel in snapkv_kernels:
        for pooling in snapkv_poolings if kernel > 1 else ["max"]:
            name = f"snapkv, {pooling}-pool {kernel}" if kernel > 1 else "snapkv, no pooling"
            methods[name] = lambda _, kernel=kernel, pooling=pooling: SnapKVScorer(kernel_size=kernel, pooling=pooling)
    methods["sinks + recent"] = lambda _: StreamingScorer()
    methods["random"] = lambda _: RandomScorer()
    methods["oracle"] = lambda answers: OracleScorer(answers.ids, answers.mask)
    return methods


class ScoreRecorder(Scorer):
    """Several scorers in one prefill, so that caches for any of them and any budget can be made from it.

    The first scorer's suffix is appended; the others must need none.
    """

    def __init__(self, scorers: dict[str, Scorer]):
        self.scorers = scorers
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = {}

    @property
    def uses_adapter(self) -> bool:
        return next(iter(self.scorers.values())).uses_adapter

    def bind(self, decoder: Any) -> Scorer:
        self.scorers = {name: scorer.bind(decoder) for name, scorer in self.scorers.items()}
        return self

    def suffix(self, decoder: Any) -> torch.Tensor | None:
        return next(iter(self.scorers.values())).suffix(decoder)

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        scores = {name: scorer.score(attention) for name, scorer in self.scorers.items()}
        self.layers[attention.layer_index] = (attention.key, attention.value, scores)
        return next(iter(scores.values()))

    def cache(self, name: str, budget: int, config: Any) -> LookaheadCache:
        """What ``LookaheadCache(budget, scorers[name])`` holds after the prefill."""
        cache = LookaheadCache(budget=budget, scorer=self.scorers[name])
        cache.build_layers(config)
        if len(self.layers) != len(cache.layers):
            raise NotImplementedError("sliding-window layers keep no record here: this model needs a prefill each")
        for index, (key, value, scores) in self.layers.items():
            cache.layers[index].evict(key, value, scores[name], budget, defer=False)
        return cache


class Bench:
    """One model, its corpora, and the numbers so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.device = torch.device(arguments.device)
        dtype = getattr(torch, arguments.dtype)
        directory = arguments.model or smollm2_directory()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(self.device).eval()
        if arguments.adapter:
            self.model.load_adapter(arguments.adapter)
        prepare_model_for_eviction(self.model)
        self.end_tokens = torch.tensor(self.model.generation_config.eos_token_id, device=self.device).reshape(-1)
        self.budgets = arguments.budgets
        self.batch_size = arguments.batch_size
        with_adapter = bool(arguments.adapter)
        self.methods = scorers(with_adapter, arguments.lookahead_kernels, arguments.snapkv_kernels, ["max", "avg"])
        # Generating takes much longer than scoring: fewer poolings.
        self.generating_methods = scorers(with_adapter, [1, 3], arguments.snapkv_kernels, ["max"])

    def batches(self, examples: list[Example]) -> Iterator[tuple[list[Example], torch.Tensor]]:
        """Prompts have one length, so nothing is padded."""
        for start in range(0, len(examples), self.batch_size):
            batch = examples[start : start + self.batch_size]
            yield batch, torch.tensor([example["input_ids"] for example in batch], device=self.device)

    def generate(self, input_ids: torch.Tensor, cache: Any, new_tokens: int) -> Answers:
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.end_tokens[0].item(),
        )
        ids = output[:, input_ids.shape[1] :]
        is_end = torch.isin(ids, self.end_tokens)
        # Up to and including the first end token.
        return Answers(ids, is_end.cumsum(1) - is_end.long() == 0)

    def texts(self, answers: Answers) -> list[str]:
        kept = [ids[mask].tolist() for ids, mask in zip(answers.ids, answers.mask, strict=True)]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=True)

    def read(self, input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits after the prompt, ``[batch, 1, vocabulary]``; the cache holds the prompt afterwards."""
        return self.model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def score_answers(self, logits: torch.Tensor, answers: Answers, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """NLL of each answer token and the model's own choice at its place, both ``[batch, length]``.

        ``logits`` are those after the prompt, which ``cache`` holds.
        """
        if answers.ids.shape[1] > 1:
            following = self.model(answers.ids[:, :-1], past_key_values=cache, use_cache=True).logits
            logits = torch.cat([logits, following], dim=1)
        nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), answers.ids, reduction="none")
        return nll, logits.argmax(-1)


@torch.no_grad()
def likelihood(bench: Bench, examples: list[Example], new_tokens: int) -> dict[str, Any]:
    """Measurement 1."""
    nlls: dict[str, list[list[float]]] = {}
    tokens: dict[str, list[list[int]]] = {}
    recalls: dict[str, list[torch.Tensor]] = {}
    reference: list[list[int]] = []

    def record(row: str, nll: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor) -> None:
        nlls.setdefault(row, []).extend(values[m].tolist() for values, m in zip(nll, mask, strict=True))
        tokens.setdefault(row, []).extend(values[m].tolist() for values, m in zip(chosen, mask, strict=True))

    for _, input_ids in tqdm(list(bench.batches(examples)), desc="likelihood"):
        answers = bench.generate(input_ids, DynamicCache(config=bench.model.config), new_tokens)
        reference.extend(ids[m].tolist() for ids, m in zip(answers.ids, answers.mask, strict=True))
        full = DynamicCache(config=bench.model.config)
        logits = bench.read(input_ids, full)
        record("full", *bench.score_answers(logits, answers, full), answers.mask)
        # The oracle appends the answer to the prompt, all others the same lookahead tokens or nothing.
        others = {name: scorer(answers) for name, scorer in bench.methods.items() if name != "oracle"}
        recorders = [ScoreRecorder({"oracle": bench.methods["oracle"](answers)}), ScoreRecorder(others)]
        for recorder in recorders:
            bench.read(input_ids, LookaheadCache(budget=min(bench.budgets), scorer=recorder))
        for budget in bench.budgets:
            best: list[torch.Tensor] = []
            # The oracle first: the others are compared with it.
            for source, name in [(each, name) for each in recorders for name in each.scorers]:
                cache = source.cache(name, budget, bench.model.config)
                record(f"{budget}/{name}", *bench.score_answers(logits, answers, cache), answers.mask)
                kept = [_as_mask(layer, input_ids.shape[1]) for layer in cache.layers if _was_evicted(layer)]
                best = best or kept
                recall = torch.stack([(a & b).sum(-1) / b.sum(-1) for a, b in zip(kept, best, strict=True)])
                recalls.setdefault(f"{budget}/{name}", []).append(recall.mean((0, 2)).cpu())

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
        best_snapkv = min(rows[f"{budget}/{name}"]["nll"] for name in bench.methods if name.startswith("snapkv"))
        for name in bench.methods:
            row = rows[f"{budget}/{name}"]
            row["closes_gap"] = (best_snapkv - row["nll"]) / (best_snapkv - rows["full"]["nll"])
    return {"prompts": len(examples), "answer_tokens": sum(map(len, reference)), "rows": rows}


def _was_evicted(layer: Any) -> bool:
    return getattr(layer, "kept_indices", None) is not None


def _as_mask(layer: Any, length: int) -> torch.Tensor:
    """``[batch, kv_heads, length]``, True for entries of the prompt that were kept."""
    kept = layer.kept_indices
    return torch.zeros(*kept.shape[:2], length, dtype=torch.bool, device=kept.device).scatter_(-1, kept, True)


@torch.no_grad()
def generated(bench: Bench, examples: list[Example], new_tokens: int, description: str) -> dict[str, Any]:
    """Measurements 2 (examples with a reference) and 3: answers as each cache gives them."""
    texts: dict[str, list[str]] = {}
    for _, input_ids in tqdm(list(bench.batches(examples)), desc=description):
        full = bench.generate(input_ids, DynamicCache(config=bench.model.config), new_tokens)
        texts.setdefault("full", []).extend(bench.texts(full))
        for budget in bench.budgets:
            for name, scorer in bench.generating_methods.items():
                cache = LookaheadCache(budget=budget, scorer=scorer(full))
                answers = bench.generate(input_ids, cache, new_tokens)
                texts.setdefault(f"{budget}/{name}", []).extend(bench.texts(answers))
    match, f1 = load_metric("answer_match"), load_metric("word_f1")
    references = [example["reference"] for example in examples]
    rows: dict[str, dict[str, float]] = {}
    for row, answers in texts.items():
        rows[row] = f1.compute(predictions=answers, references=texts["full"])
        if all(references):
            accuracy = match.compute(predictions=answers, references=references)["answer_match"]
            rows[row]["accuracy"] = accuracy
            if rows["full"]["accuracy"]:
                rows[row]["kept"] = accuracy / rows["full"]["accuracy"]
    return {"prompts": len(examples), "rows": rows}


def read_documents(paths: list[Path]) -> list[dict[str, Any]]:
    documents = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            documents += [json.loads(line) for line in lines]
    return documents


def describe(arguments: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    on_gpu = bench.device.type == "cuda"
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in arguments.texts}
    weights = Path(arguments.adapter) / "adapter_model.safetensors" if arguments.adapter else None
    return {
        "hardware": torch.cuda.get_device_name(bench.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "lkq_hf": lkq_hf.__version__,
        },
        "model": bench.model.config._name_or_path if arguments.model else "HuggingFaceTB/SmolLM2-135M-Instruct",
        "adapter": Path(arguments.adapter).name if arguments.adapter else None,
        "adapter_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights and weights.is_file() else None,
        "dtype": arguments.dtype,
        "texts_sha256": digests,
        "seed": arguments.seed,
    }


def table(budgets: list[int], methods: Methods, rows: dict[str, dict[str, float]], columns: dict[str, str]) -> str:
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
    parts = [
        "# Quality of answers over an evicted cache",
        f"{about['model']}, adapter: {about['adapter']}. {about['hardware']}, {about['dtype']}; {versions}. "
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
        parts.append(table(bench.budgets, bench.methods, measured["rows"], titles))
    return "\n\n".join(parts) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path, required=True, help="documents as written by texts.py")
    parser.add_argument("--source", default="debian-handbook", help="source of the texts of measurements 1 and 3")
    parser.add_argument("--adapter", help="directory of a LOOKAHEAD_KV adapter; without it, only the others")
    parser.add_argument("--model", help="directory of another model than SmolLM2-135M-Instruct")
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256])
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
