"""What each part of a lookahead adapter and of its training brings: short trainings that differ in one thing.

    lkq-hf generate-targets MODEL --documents documents.jsonl.gz --out targets --max-new-tokens 64
    python benchmarks/adapter_ablation.py MODEL --targets targets --out benchmarks/results/adapter_ablation.json

Every variant is trained for the same steps on the same prompts and compared by the recall of the response's most
important entries on validation prompts, and by the paper's objective (KL divergence of the importance, power 1).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from peft import get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from lkq_hf import LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments
from lkq_hf.training import load_targets

# Arguments of the config and of the training that differ from the first variant's.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reference": ({}, {}),
    "8 tokens": ({"num_lookahead_tokens": 8}, {}),
    "16 tokens": ({"num_lookahead_tokens": 16}, {}),
    "64 tokens": ({"num_lookahead_tokens": 64}, {}),
    "no LoRA": ({"target_modules": []}, {}),
    "tokens not trained": ({}, {"freeze_tokens": True}),
    "LoRA on attention only": ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, {}),
    "rank 32": ({"r": 32}, {}),
    "square root of the importance": ({}, {"importance_power": 0.5}),
    "root mean square over tokens": ({"row_power": 2.0}, {}),
    "importance per KV head": ({}, {"importance_heads": "kv"}),
    "learning rate 1e-3": ({}, {"learning_rate": 1e-3}),
    "learning rate 4e-3": ({}, {"learning_rate": 4e-3}),
}


def train_variant(
    base: Any, config: dict[str, Any], training: dict[str, Any], data: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    set_seed(arguments.seed)
    training = {"learning_rate": 2e-3} | training
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
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.unload()
    recalls = {name.removeprefix("eval_"): value for name, value in metrics.items() if "recall" in name}
    return {"kl": metrics["eval_loss"], **recalls, "parameters": parameters, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--targets", type=Path, required=True, help="directory that generate-targets wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=2048, help="longest training prompt, in tokens")
    parser.add_argument("--validation-prompts", type=int, default=96)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    dtype = torch.bfloat16 if arguments.device != "cpu" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
    sets = {name: load_targets(arguments.targets / name) for name in ("train", "validation")}
    train = sets["train"].filter(lambda row: len(row["input_ids"]) <= arguments.max_length)
    validation = sets["validation"].filter(lambda row: len(row["input_ids"]) <= 2 * arguments.max_length)
    data = {
        "train": train,
        "validation": validation.select(range(min(arguments.validation_prompts, len(validation)))),
    }
    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "model", "targets")}
    results: dict[str, Any] = {"environment": describe(), "settings": settings, "variants": {}}
    for name in arguments.variants:
        results["variants"][name] = train_variant(base, *VARIANTS[name], data, arguments)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        row = results["variants"][name]
        recalls = "  ".join(f"{row[f'recall@{budget}']:.3f}" for budget in arguments.budgets)
        print(f"{name:35s} KL {row['kl']:.4f}  recall {recalls}  {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
