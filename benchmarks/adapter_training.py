"""Trains an adapter further for a number of minutes, and says what evicted answers lose before, meanwhile and after.

    python benchmarks/texts.py *.deb --characters 3000000 --english --out texts.jsonl.gz
    python benchmarks/adapter_training.py --texts texts.jsonl.gz --out run --prompts-only --workers 8   # needs no GPU
    python benchmarks/adapter_training.py --texts texts.jsonl.gz --out run --minutes 12

Starts from the shipped adapter of SmolLM2-135M-Instruct, or from ``--adapter`` ("new" for none). Prompts and answers
are made in ``OUT/targets`` as by `lkq-hf generate-targets`; what is there is not made again, and the texts are then
not needed. The learning rate follows a cosine over the minutes, whatever the number of steps. The adapter of the best
evaluation goes to ``OUT/adapter``, all numbers to ``OUT/results.json``, which is written anew after every evaluation.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import common
import torch
from common import DEVICE, MODELS, describe, save
from peft import PeftModel, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from lkq_hf import LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments, shipped_adapter
from lkq_hf.cli.generate_targets import make_targets
from lkq_hf.cli.target_options import TargetOptions
from lkq_hf.evaluation.judge import AnswerJudge
from lkq_hf.evaluation.profile import BUDGETS, measure_profile, write_profile
from lkq_hf.hub import write_training_record
from lkq_hf.training import load_targets
from lkq_hf.training.checkpoints import save_adapter
from lkq_hf.training.data import usable_targets

WARM_UP = 0.05
"""Share of the time in which the learning rate rises."""

# More planted facts than by default, and all lengths equally often: short answers decide, and long prompts are where
# the shipped adapter falls short.
MIX = {
    "length_skew": 0,
    "answer_start_share": 0.4,
    "later_turn_share": 0.25,
    "weights": {
        "fact": 3, "fact_among_several": 3.5, "all_facts": 0.5, "question": 3, "documents": 1.5, "section": 0.3,
        "quote": 0.5, "cloze": 0.5, "explain": 2.5, "compare": 0.7, "summarise": 2.5, "summarise_part": 0.5,
        "copy": 0.7, "continue": 2, "raw": 0.7,
    },
}  # fmt: skip


class Clock(TrainerCallback):
    """Ends a training after a time, evaluates at equal distances, and moves what depends on the time."""

    def __init__(self, options: argparse.Namespace, results: dict[str, Any]) -> None:
        self.options = options
        self.results = results
        self.seconds = 60 * options.minutes
        self.started: float | None = None
        self.evaluated = 0
        # Evaluations do not count as training.
        self.paused = 0.0
        self.stopped: float | None = None

    @property
    def share(self) -> float:
        """Of the time that has passed."""
        if self.started is None:
            return 0.0
        now = time.monotonic() if self.stopped is None else self.stopped
        return min((now - self.started - self.paused) / self.seconds, 1.0)

    def learning_rate(self, _: int) -> float:
        """As a share of the peak."""
        rise = min(self.share / WARM_UP, 1.0)
        return rise * (1 + math.cos(math.pi * self.share)) / 2

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.started = self.started or time.monotonic()
        if self.stopped is not None:
            self.paused += time.monotonic() - self.stopped
            self.stopped = None
        high, low = self.options.temperature
        args.eviction_temperature = high + (low - high) * min(self.share / 0.6, 1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        due = int(self.share * self.options.evaluations)
        if due > self.evaluated:
            self.evaluated = due
            self.stopped = time.monotonic()
            control.should_evaluate = True
        if self.share >= 1:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **rest: Any) -> None:
        self.results["evaluations"].append({"step": state.global_step, "share": round(self.share, 4), **metrics})
        self.write(state)

    def write(self, state: Any) -> None:
        self.results["losses"] = [
            {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm")}
            for entry in state.log_history
            if "loss" in entry
        ]
        save(self.options.out / "results", self.results)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, or a directory")
    parser.add_argument("--adapter", default="shipped", help='directory, "shipped" or "new"')
    parser.add_argument("--texts", type=Path, nargs="+", help="jsonl or jsonl.gz with a 'text' each")
    parser.add_argument("--prompts-only", action="store_true")
    parser.add_argument("--count", type=int, default=6000, help="training prompts")
    parser.add_argument("--validation-count", type=int, default=128)
    parser.add_argument("--min-length", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-tokens", type=int, default=600_000, help="of a batch of answers")
    parser.add_argument("--workers", type=int, default=1, help="processes that build prompts")
    parser.add_argument("--mix", default=json.dumps(MIX), help="fields of PromptMix, as JSON")
    parser.add_argument("--minutes", type=float, default=10, help="of training, without evaluations")
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--allocation", default="global", choices=["global", "layer", "uniform"])
    parser.add_argument("--eviction-weight", type=float, default=0.5)
    parser.add_argument("--eviction-budgets", type=int, nargs=2, default=[48, 384])
    parser.add_argument("--temperature", type=float, nargs=2, default=[0.25, 0.1], help="first and last")
    parser.add_argument("--importance-power", type=float, default=1.5)
    parser.add_argument("--inside-answer-share", type=float, default=0.2)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device-batch-size", type=int, default=16)
    parser.add_argument("--recompute", action="store_true", help="less memory, slower steps")
    parser.add_argument("--judge-prompts", type=int, default=96)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(directory: Path, options: argparse.Namespace) -> Any:
    """The base model with the adapter to go on from."""
    dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(options.device).eval()
    if options.adapter == "new":
        return get_peft_model(base, LookaheadKVConfig(task_type="CAUSAL_LM", row_power=2.0))
    path = shipped_adapter() if options.adapter == "shipped" else options.adapter
    return PeftModel.from_pretrained(base, str(path), is_trainable=True)


def main() -> None:
    options = parse()
    directory = MODELS[options.model]() if options.model in MODELS else Path(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # The recipe of prompts names the texts and does not read them again where prompts are there.
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    targets = options.out / "targets"
    make_targets(TargetOptions.like(options, model=str(directory), out=targets, documents=options.texts, dtype=dtype))
    if options.prompts_only:
        return
    # Names of files and directories only: results are passed on.
    settings = common.settings(options, "texts") | {"texts": [path.name for path in options.texts or []]}
    settings |= {name: Path(settings[name]).name for name in ("model", "adapter")}
    results: dict[str, Any] = {
        "environment": describe(), "settings": settings, "seconds": {"targets": time.monotonic() - started},
        "evaluations": [],
    }  # fmt: skip
    set_seed(options.seed)
    train = usable_targets(
        [load_targets(targets / "train")],
        cut_loops=True,
        inside_answer_share=options.inside_answer_share,
        seed=options.seed,
    )
    validation = usable_targets([load_targets(targets / "validation")], cut_loops=True)
    judged = list(validation.select(range(min(options.judge_prompts, len(validation)))))
    judge = AnswerJudge(judged, options.budgets, options.allocation)
    model = load(directory, options)
    clock = Clock(options, results)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=0.0)
    same = ("max_steps", "importance_power", "eviction_weight", "eviction_budgets", "recompute", "seed")
    arguments = LookaheadTrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        per_device_train_batch_size=options.device_batch_size,
        per_device_eval_batch_size=options.device_batch_size,
        gradient_accumulation_steps=max(1, options.batch_size // options.device_batch_size),
        eviction_temperature=options.temperature[0],
        eviction_allocation=options.allocation,
        metric_for_best_model="lost",
        greater_is_better=False,
        save_steps=options.max_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        use_cpu=options.device == "cpu",
        **{name: getattr(options, name) for name in same},
    )
    trainer = LookaheadTrainer(
        model,
        arguments,
        judge=judge,
        train_dataset=train,
        eval_dataset=validation,
        callbacks=[clock],
        optimizers=(optimizer, LambdaLR(optimizer, clock.learning_rate)),
    )
    trainer.evaluate()  # what it starts from
    before = time.monotonic()
    trainer.train()
    results["seconds"]["training and evaluations"] = time.monotonic() - before
    results["best step"] = step = trainer.load_best()
    metrics = trainer.evaluate()
    save_adapter(model, options.out / "adapter")
    write_training_record(options.out / "adapter", {"steps": step, **settings}, metrics)
    before = time.monotonic()
    prompts = [row["input_ids"] for row in validation]
    profile = measure_profile(model.eval(), prompts[: options.judge_prompts], BUDGETS)
    if profile is not None:
        write_profile(options.out / "adapter", profile)
    results["seconds"]["profile"] = time.monotonic() - before
    if options.device != "cpu":
        results["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    clock.write(trainer.state)
    shutil.rmtree(options.out / "checkpoints")
    first, last = results["evaluations"][0], results["evaluations"][-1]
    print(f"lost: {first['eval_lost']:.4f} before, {last['eval_lost']:.4f} at step {step}, the best")


if __name__ == "__main__":
    main()
