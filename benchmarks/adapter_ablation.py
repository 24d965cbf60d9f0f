"""What each part of a lookahead adapter and of its training brings: short trainings that differ in one thing.

    lkq-hf generate-targets MODEL --documents documents.jsonl.gz --out targets --max-new-tokens 64
    python benchmarks/adapter_ablation.py MODEL --targets targets --out benchmarks/results/adapter_ablation.json

Every variant is trained for the same steps on the same prompts. What counts is the gap closed: the share of the
distance in likelihood from the better of two SnapKVs (no pooling, average-pool 3) to the full cache, over the model's
own responses to validation prompts. Recall of the response's most important entries, and the paper's objective (KL
divergence of the importance, power 1), are there to show that they do not order variants the same way.
"""

import argparse
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, describe, parser, save, settings
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from lkq_hf import LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments, prepare_model_for_eviction
from lkq_hf.evaluation.decoding import Answers, score_answers
from lkq_hf.evaluation.prefill import read_prompts
from lkq_hf.scoring import LookaheadScorer, Scorer, SnapKVScorer
from lkq_hf.training import TargetCollator, load_targets

# Arguments of the config and of the training that differ from the first variant's, the recipe of the shipped adapter.
REFERENCE: tuple[dict[str, Any], dict[str, Any]] = (
    {"row_power": 2.0},
    {"importance_power": 1.5, "learning_rate": 3e-3, "eviction_weight": 0.0, "eviction_allocation": "uniform"},
)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reference": ({}, {}),
    "no LoRA": ({"target_modules": []}, {}),
    "tokens not trained": ({}, {"freeze_tokens": True}),
    "8 tokens": ({"num_lookahead_tokens": 8}, {}),
    "16 tokens": ({"num_lookahead_tokens": 16}, {}),
    "64 tokens": ({"num_lookahead_tokens": 64}, {}),
    "eviction objective": ({}, {"eviction_weight": 1.0}),
    "eviction objective, heads of a layer compete": ({}, {"eviction_weight": 1.0, "eviction_allocation": "layer"}),
    "eviction objective, all heads compete": ({}, {"eviction_weight": 1.0, "eviction_allocation": "global"}),
    "eviction objective, importance power 1": ({}, {"eviction_weight": 1.0, "importance_power": 1.0}),
    "eviction temperature 0.3": ({}, {"eviction_weight": 1.0, "eviction_temperature": 0.3}),
    "LoRA on attention only": ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, {}),
    "rank 32": ({"r": 32}, {}),
    "mean over tokens": ({"row_power": 1.0}, {}),
    "importance power 1": ({}, {"importance_power": 1.0}),
    "importance power 0.5": ({}, {"importance_power": 0.5}),
    "the paper's objective": ({"row_power": 1.0}, {"importance_power": 1.0}),
    "importance per KV head": ({}, {"importance_heads": "kv"}),
    "learning rate 1e-3": ({}, {"learning_rate": 1e-3}),
    "learning rate 6e-3": ({}, {"learning_rate": 6e-3}),
}
# How every variant's scores are pooled when it is read.
POOLINGS = {"no pooling": 1, "max-pool 3": 3, "max-pool 5": 5}


class Likelihood:
    """How likely the full cache's responses to some prompts are when the cache is evicted."""

    def __init__(self, model: PreTrainedModel, targets: Dataset, budgets: list[int]):
        self.budgets = budgets
        prompts: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in targets:
            if len(row["input_ids"]) > max(budgets):
                prompts[len(row["input_ids"])].append(row)
        self.batches = []
        for rows in prompts.values():
            batch = TargetCollator()(rows)
            self.batches.append((batch["input_ids"], Answers(batch["response_ids"], batch["response_mask"])))
        prepare_model_for_eviction(model)
        snapkv = {"none": SnapKVScorer(kernel_size=1), "average 3": SnapKVScorer(kernel_size=3, pooling="avg")}
        found = self.nll(model, snapkv)
        self.baseline = {budget: min(found[name, budget] for name in snapkv) for budget in budgets}
        self.full = found["full", 0]

    def nll(self, model: PreTrainedModel, scorers: Mapping[str, Scorer]) -> dict[tuple[str, int], float]:
        """Nats per token of a response, for each scorer and budget, and for the full cache."""
        total: Counter[tuple[str, int]] = Counter()
        tokens = 0
        for input_ids, answers in self.batches:
            answers = Answers(answers.ids.to(model.device), answers.mask.to(model.device))
            input_ids = input_ids.to(model.device)
            prefill = read_prompts(model, input_ids, torch.ones_like(input_ids), scorers, self.budgets)
            for cell, cache in {("full", 0): prefill.full, **prefill.caches}.items():
                nll, _ = score_answers(model, prefill.logits, prefill.mask, cache, answers)
                total[cell] += nll[answers.mask].sum().item()
            tokens += int(answers.mask.sum())
        return {cell: value / tokens for cell, value in total.items()}

    def gap_closed(self, model: PreTrainedModel) -> dict[str, dict[int, float]]:
        """By pooling and budget."""
        found = self.nll(model, {name: LookaheadScorer(kernel_size=size) for name, size in POOLINGS.items()})
        return {
            name: {
                budget: (self.baseline[budget] - found[name, budget]) / (self.baseline[budget] - self.full)
                for budget in self.budgets
            }
            for name in POOLINGS
        }


def train_variant(
    base: PreTrainedModel,
    config: dict[str, Any],
    training: dict[str, Any],
    data: dict[str, Any],
    likelihood: Likelihood,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    set_seed(arguments.seed)
    config, training = REFERENCE[0] | config, REFERENCE[1] | training
    freeze_tokens = training.pop("freeze_tokens", False)
    model = get_peft_model(base, LookaheadKVConfig(task_type="CAUSAL_LM", **config))
    if freeze_tokens:
        for name, parameter in model.named_parameters():
            if "lookahead_kv_tokens" in name:
                parameter.requires_grad = False
    with tempfile.TemporaryDirectory() as directory:
        options = LookaheadTrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            max_steps=arguments.steps,
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
            use_cpu=base.device.type == "cpu",
            recall_budgets=arguments.budgets,
            **training,
        )
        trainer = LookaheadTrainer(model, options, train_dataset=data["train"], eval_dataset=data["validation"])
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        # One objective for all, whatever a variant was trained with.
        options.importance_power, options.importance_heads = 1.0, "query"
        metrics = trainer.evaluate()
    closed = likelihood.gap_closed(model)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.unload()
    recalls = {name.removeprefix("eval_"): value for name, value in metrics.items() if "recall" in name}
    return {"gap_closed": closed, "kl": metrics["eval_loss"], **recalls, "parameters": parameters, "seconds": seconds}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("model")
    options.add_argument("--targets", type=Path, required=True, help="directory that generate-targets wrote")
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--max-length", type=int, default=2048, help="longest training prompt, in tokens")
    options.add_argument("--validation-prompts", type=int, default=96)
    options.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    options.add_argument("--device", default=DEVICE)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    dtype = torch.bfloat16 if given.device != "cpu" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).to(given.device).eval()
    sets = {name: load_targets(given.targets / name) for name in ("train", "validation")}
    lengths = {"train": given.max_length, "validation": 2 * given.max_length}
    data = {
        name: rows.filter(lambda row, most=lengths[name]: len(row["input_ids"]) <= most) for name, rows in sets.items()
    }
    data["validation"] = data["validation"].select(range(min(given.validation_prompts, len(data["validation"]))))
    likelihood = Likelihood(base, data["validation"], given.budgets)
    results: dict[str, Any] = {"environment": describe(), "settings": settings(given, "model"), "variants": {}}
    results["nll"] = {"full cache": likelihood.full, "best SnapKV": likelihood.baseline}
    for name in given.variants:
        results["variants"][name] = row = train_variant(base, *VARIANTS[name], data, likelihood, given)
        save(given.out, results)
        print(name, row, flush=True)


if __name__ == "__main__":
    main()
