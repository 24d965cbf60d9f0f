"""``lkq-hf train``: a lookahead adapter from documents, or from targets that were made before."""

from typing import Any

import typer

from lkq_hf.cli.checks import (
    SOFT_ALLOCATIONS,
    check_adapter_directory,
    check_choice,
    check_dtype,
    check_model_directory,
    check_targets,
    check_writable,
    whole_numbers,
)
from lkq_hf.cli.dataclass_command import dataclass_command
from lkq_hf.cli.generate_targets import make_targets
from lkq_hf.cli.options import check_adapter, find_device, load_model, model_note
from lkq_hf.cli.output import report
from lkq_hf.cli.target_options import TargetOptions
from lkq_hf.cli.train_options import TrainOptions

# What a card says of a training.
IN_THE_CARD = (
    "learning_rate", "batch_size", "importance_heads", "importance_power", "eviction_weight", "allocation",
    "inside_answer_share", "cut_loops", "max_repetition", "seed", "dtype",
)  # fmt: skip
# Prompts in a forward, if they fit: more are hardly faster.
MOST_TOGETHER = 32
# What it depends on besides.
IN_THE_NOTE = ("base_model_name", "epochs", "max_steps", "eval_steps", "judge_prompts")


def run(options: TrainOptions) -> None:
    """Train a lookahead adapter, from documents or targets.

    With --documents all is done: prompts, the model's answers, the training, the choice of the best checkpoint by what
    evicted answers lose, the numbers for allocation="profile", and a model card.

    Started again after a stop, it goes on from the last checkpoint. What was trained with other arguments is refused.

    Under `accelerate launch`, the prompts of each step are divided among the processes.

    These are the options that most trainings need; --help-config prints a file with all of them.
    """
    _check(options)

    from accelerate.utils import parse_flag_from_env
    from peft import PeftModel, get_peft_model
    from transformers import TrainerCallback, set_seed

    from lkq_hf.adapter import LookaheadKVConfig
    from lkq_hf.cache.allocation import MOST
    from lkq_hf.evaluation.judge import AnswerJudge
    from lkq_hf.evaluation.profile import measure_profile, write_profile
    from lkq_hf.files import naming
    from lkq_hf.hub import write_draft, write_training_record
    from lkq_hf.runs import Run
    from lkq_hf.training import LookaheadTrainer, load_targets
    from lkq_hf.training.checkpoints import last_complete_checkpoint, save_adapter
    from lkq_hf.training.data import usable_targets
    from lkq_hf.training.memory import prompts_that_fit

    out, adapter = options.out, options.adapter
    if adapter is not None:
        check_adapter(str(adapter))
    measured_budgets = whole_numbers("--profile-budgets", options.profile_budgets) if options.profile_budgets else []
    state, place = find_device(options.device)
    share = _share(options.batch_size, state.num_processes)
    shape: dict[str, Any] = {
        "num_lookahead_tokens": options.num_lookahead_tokens,
        "r": options.rank,
        "lora_alpha": options.lora_alpha,
        "row_power": options.row_power,
        "pooling_kernel_size": options.pooling_kernel_size,
        "pooling": options.pooling,
        "neighbor_weight": options.neighbor_weight,
        "target_modules": None if options.lora else [],
    }
    config = LookaheadKVConfig(**shape)
    targets = options.targets
    if targets is None:
        targets = [out / "targets"]
        make_targets(TargetOptions.like(options, out=targets[0], seed=TargetOptions.seed))
    train_dataset = usable_targets(
        [load_targets(directory / "train") for directory in targets],
        options.max_repetition,
        options.cut_loops,
        options.inside_answer_share,
        options.seed,
    )
    eval_dataset = usable_targets([load_targets(targets[0] / "validation")], cut_loops=options.cut_loops)
    set_seed(options.seed)
    fsdp, deepspeed = (parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED"))
    # What shards a model takes it from main memory, piece by piece.
    causal_lm, _ = load_model(options.model, options.dtype, "cpu" if fsdp or deepspeed else place)
    about = {name: getattr(options, name) for name in IN_THE_CARD} | {"adapter": adapter and adapter.name}
    checkpoints = out / "checkpoints"
    if options.base_model_name is not None:
        causal_lm.name_or_path = causal_lm.config._name_or_path = options.base_model_name
    if adapter is not None:
        peft_model = PeftModel.from_pretrained(causal_lm, str(adapter), is_trainable=True)
    else:
        peft_model = get_peft_model(causal_lm, config)
    last = last_complete_checkpoint(checkpoints)
    shards = [shard for directory in targets for shard in sorted(directory.glob("*/shard-*.parquet"))]
    note = {
        "command": "train",
        "targets": list(map(str, targets)),
        **{name: getattr(options, name) for name in IN_THE_NOTE},
        **shape,
        **about,
        "adapter": adapter and str(adapter),
        **model_note(options.model, causal_lm, options.dtype, *shards, adapter),
    }
    noted = Run(checkpoints, note, "checkpoint-*")
    # DeepSpeed's weights are whole only inside of its own forwards.
    judged = [] if deepspeed else list(eval_dataset.select(range(min(options.judge_prompts, len(eval_dataset)))))
    judge = AnswerJudge(judged, allocation=options.allocation)

    class NoteOfArguments(TrainerCallback):
        """Left after the first step, before any checkpoint: what fails until then may be tried with others."""

        def on_step_end(self, *states: Any, **rest: Any) -> None:
            noted.begin()

    def make_trainer(together: int) -> LookaheadTrainer:
        return LookaheadTrainer(
            peft_model,
            _arguments(
                options,
                output_dir=str(checkpoints),
                metric_for_best_model="lost" if judge else None,
                per_device_train_batch_size=together,
                per_device_eval_batch_size=together,
                gradient_accumulation_steps=share // together,
                use_cpu=place == "cpu",
                # DeepSpeed wants one type for all weights that it trains with.
                bf16=deepspeed and options.dtype == "bfloat16",
            ),
            judge=judge,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[NoteOfArguments()],
        )

    with naming(checkpoints):
        together = _largest_divisor(share, options.device_batch_size or MOST_TOGETHER)
        trainer = make_trainer(together)
        if options.device_batch_size is None and (fits := prompts_that_fit(trainer, together)) < together:
            trainer = make_trainer(_largest_divisor(share, fits))
        trainer.train(resume_from_checkpoint=last)
        step = trainer.load_best()
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        with trainer.checkpoints_of_the_adapter():
            if state.is_main_process:
                save_adapter(peft_model, out)
                write_training_record(out, {"steps": step, "of": trainer.state.global_step, **about}, metrics)
        profile = None
        if measured_budgets and not deepspeed:
            held_out = [row["input_ids"] for row in load_targets(targets[0] / "validation")]
            long_enough = [prompt for prompt in held_out if len(prompt) >= MOST * min(measured_budgets)]
            # Every process reads the same prompts: where the model is sharded, a forward needs all of them.
            profile = measure_profile(
                peft_model.eval(),
                long_enough[: options.profile_prompts],
                measured_budgets,
                progress=state.is_main_process,
            )
    if state.is_main_process:
        if profile is not None:
            write_profile(out, profile)
        elif measured_budgets:
            reason = (
                "under DeepSpeed they are not measured"
                if deepspeed
                else f"no validation prompt is {MOST} times as long as the smallest budget"
            )
            typer.echo(
                f'the adapter got no numbers for allocation="profile": {reason}. Measure them with `lkq-hf profile`',
                err=True,
            )
        write_draft(out)
        lost = f", {metrics['eval_lost']:.4f} nats a token lost" if judge else ""
        report(
            f"adapter of step {step} saved to {out}; validation KL {metrics['eval_loss']:.4f}{lost}",
            {"adapter": out, "step": step, "metrics": metrics},
        )


train = dataclass_command(TrainOptions, run)


def _check(options: TrainOptions) -> None:
    """What can be told in milliseconds."""
    check_dtype(options.dtype)
    check_choice("--pooling", options.pooling, ("max", "avg", "sum"))
    check_choice("--importance-heads", options.importance_heads, ("query", "kv"))
    check_choice("--allocation", options.allocation, SOFT_ALLOCATIONS)
    if (options.documents is None) == (options.targets is None):
        raise ValueError("pass either --documents, to make targets from, or --targets that were made before")
    check_model_directory(options.model)
    if options.targets is not None:
        check_targets(options.targets)
    if options.adapter is not None:
        check_adapter_directory(str(options.adapter))
    check_writable(options.out)


def _arguments(options: TrainOptions, **others: Any) -> Any:
    """The trainer's arguments."""
    from lkq_hf.training import LookaheadTrainingArguments

    return LookaheadTrainingArguments(
        learning_rate=options.learning_rate,
        importance_heads=options.importance_heads,
        importance_power=options.importance_power,
        eviction_weight=options.eviction_weight,
        eviction_allocation=options.allocation,
        recompute=options.recompute,
        greater_is_better=False,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=20,
        report_to=[],
        seed=options.seed,
        **others,
    )


def _share(batch_size: int, processes: int) -> int:
    """Each process's part of a step.

    Raises:
        ValueError: not a whole one.
    """
    if batch_size < 1 or batch_size % processes:
        raise ValueError(f"--batch-size {batch_size} cannot be divided among {processes} processes; pass a multiple")
    return batch_size // processes


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)
