"""``lkq-hf train``: a lookahead adapter from documents, or from targets that were made before."""

from pathlib import Path
from typing import Annotated, Any

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
from lkq_hf.cli.generate_targets import COUNT, NEW_TOKENS, make_targets
from lkq_hf.cli.options import Device, Dtype, Model, check_adapter, find_device, load_model, model_note
from lkq_hf.cli.output import AsJson, report


def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the adapter; checkpoints go to its 'checkpoints' folder.")],
    documents: Annotated[
        list[Path] | None,
        typer.Option(
            help="Make the targets first, in the 'targets' folder of --out, from these documents: jsonl or jsonl.gz "
            "with a 'text' each, or plain text files.",
            dir_okay=False,
        ),
    ] = None,
    targets: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead, a directory that generate-targets wrote; with several, the first one validates.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="With --documents: training prompts to make.", min=1)] = COUNT,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="With --documents: longest prompt, in tokens. By default 8192, or the model's positions if fewer."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="With --documents: longest response, in tokens.", min=1)
    ] = NEW_TOKENS,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Go on from this trained adapter, whose shape is kept.", exists=True, file_okay=False),
    ] = None,
    base_model_name: Annotated[
        str | None, typer.Option(help="Name of the base model that the adapter records, if not MODEL.")
    ] = None,
    num_lookahead_tokens: Annotated[int, typer.Option(help="Learned tokens.", min=1)] = 32,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.", min=1)] = 8,
    lora_alpha: Annotated[float, typer.Option(help="The LoRA's update is scaled by lora_alpha / rank.")] = 32,
    lora: Annotated[bool, typer.Option(help="Train a LoRA on the lookahead positions beside the tokens.")] = True,
    row_power: Annotated[float, typer.Option(help="Exponent of the mean over the learned tokens; 1: paper.")] = 2.0,
    pooling_kernel_size: Annotated[int, typer.Option(help="Pooling that the adapter's config recommends.")] = 1,
    pooling: Annotated[str, typer.Option(help="How it pools: max, avg or sum.")] = "max",
    neighbor_weight: Annotated[float, typer.Option(help="What a neighbor counts, with --pooling sum.")] = 1.0,
    importance_heads: Annotated[str, typer.Option(help="Heads whose importance is compared: query or kv.")] = "query",
    importance_power: Annotated[float, typer.Option(help="Power of the importance; 1 as in the paper.")] = 1.5,
    eviction_weight: Annotated[
        float, typer.Option(help="Weight of what the response loses over the evicted cache; 0: paper.")
    ] = 0.5,
    allocation: Annotated[
        str,
        typer.Option(help="How that cache shares its budget out: global, layer or uniform, as the adapter is used."),
    ] = "global",
    recompute: Annotated[
        bool, typer.Option(help="Read each layer again in the backward pass: less memory, slower steps.")
    ] = True,
    inside_answer_share: Annotated[
        float, typer.Option(help="Share of the prompts that end inside the model's own answer.", min=0, max=1)
    ] = 0.2,
    cut_loops: Annotated[
        bool, typer.Option(help="Cut responses where they begin to repeat themselves, as small models' often do.")
    ] = True,
    max_repetition: Annotated[
        float, typer.Option(help="Leave out responses of which a larger share repeats itself (0.3 drops loops).")
    ] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    batch_size: Annotated[int, typer.Option(help="Prompts per step, over all processes.", min=1)] = 32,
    device_batch_size: Annotated[int, typer.Option(help="Most prompts in a forward of one device.", min=1)] = 32,
    epochs: Annotated[float, typer.Option(help="Passes over the training set.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Steps; overrides epochs if positive.")] = -1,
    eval_steps: Annotated[
        int, typer.Option(help="Steps between two evaluations, whose best one gives the adapter.", min=1)
    ] = 50,
    save_steps: Annotated[int, typer.Option(help="Steps between two checkpoints.", min=1)] = 50,
    judge_prompts: Annotated[
        int, typer.Option(help="Validation prompts that choose the best evaluation, at most; 0: the last step.", min=0)
    ] = 128,
    profile_budgets: Annotated[
        str,
        typer.Option(help="Budgets for which the mean numbers per head are measured at the end; empty for none."),
    ] = "64,128,256,512,1024",
    profile_prompts: Annotated[int, typer.Option(help="Validation prompts to measure them on, at most.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a lookahead adapter, from documents or targets.

    With --documents all is done: prompts, the model's answers, the training, the choice of the best checkpoint by what
    evicted answers lose, the numbers for allocation="profile", and a model card.

    Started again after a stop, it goes on from the last checkpoint. What was trained with other arguments is refused.

    Under `accelerate launch`, the prompts of each step are divided among the processes.
    """
    check_dtype(dtype)
    check_choice("--pooling", pooling, ("max", "avg", "sum"))
    check_choice("--importance-heads", importance_heads, ("query", "kv"))
    check_choice("--allocation", allocation, SOFT_ALLOCATIONS)
    if (documents is None) == (targets is None):
        raise ValueError("pass either --documents, to make targets from, or --targets that were made before")
    check_model_directory(model)
    if targets is not None:
        check_targets(targets)
    if adapter is not None:
        check_adapter_directory(str(adapter))
    check_writable(out)

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
    from lkq_hf.training import LookaheadTrainer, LookaheadTrainingArguments, load_targets
    from lkq_hf.training.checkpoints import last_complete_checkpoint, save_adapter
    from lkq_hf.training.data import usable_targets

    if adapter is not None:
        check_adapter(str(adapter))
    measured_budgets = whole_numbers("--profile-budgets", profile_budgets) if profile_budgets else []
    state, place = find_device(device)
    forward_size = _largest_divisor(_share(batch_size, state.num_processes), device_batch_size)
    shape: dict[str, Any] = {
        "num_lookahead_tokens": num_lookahead_tokens,
        "r": rank,
        "lora_alpha": lora_alpha,
        "row_power": row_power,
        "pooling_kernel_size": pooling_kernel_size,
        "pooling": pooling,
        "neighbor_weight": neighbor_weight,
        "target_modules": None if lora else [],
    }
    config = LookaheadKVConfig(**shape)
    if targets is None:
        targets = [out / "targets"]
        make_targets(
            model=model,
            out=targets[0],
            documents=documents,
            count=count,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            device=device,
        )
    train_dataset = usable_targets(
        [load_targets(directory / "train") for directory in targets],
        max_repetition,
        cut_loops,
        inside_answer_share,
        seed,
    )
    eval_dataset = usable_targets([load_targets(targets[0] / "validation")], cut_loops=cut_loops)
    set_seed(seed)
    fsdp, deepspeed = (parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED"))
    # What shards a model takes it from main memory, piece by piece.
    causal_lm, _ = load_model(model, dtype, "cpu" if fsdp or deepspeed else place)
    options = {
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "importance_heads": importance_heads,
        "importance_power": importance_power,
        "eviction_weight": eviction_weight,
        "allocation": allocation,
        "inside_answer_share": inside_answer_share,
        "cut_loops": cut_loops,
        "max_repetition": max_repetition,
        "adapter": adapter and adapter.name,
        "seed": seed,
        "dtype": dtype,
    }
    checkpoints = out / "checkpoints"
    if base_model_name is not None:
        causal_lm.name_or_path = causal_lm.config._name_or_path = base_model_name
    if adapter is not None:
        peft_model = PeftModel.from_pretrained(causal_lm, str(adapter), is_trainable=True)
    else:
        peft_model = get_peft_model(causal_lm, config)
    last = last_complete_checkpoint(checkpoints)
    shards = [shard for directory in targets for shard in sorted(directory.glob("*/shard-*.parquet"))]
    note = {
        "command": "train",
        "targets": list(map(str, targets)),
        "base_model_name": base_model_name,
        "epochs": epochs,
        "max_steps": max_steps,
        "eval_steps": eval_steps,
        "judge_prompts": judge_prompts,
        **shape,
        **options,
        "adapter": adapter and str(adapter),
        **model_note(model, causal_lm, dtype, *shards, adapter),
    }
    run = Run(checkpoints, note, "checkpoint-*")
    # DeepSpeed's weights are whole only inside of its own forwards.
    judged = [] if deepspeed else list(eval_dataset.select(range(min(judge_prompts, len(eval_dataset)))))
    judge = AnswerJudge(judged, allocation=allocation)
    arguments = LookaheadTrainingArguments(
        output_dir=str(checkpoints),
        learning_rate=learning_rate,
        importance_heads=importance_heads,
        importance_power=importance_power,
        eviction_weight=eviction_weight,
        eviction_allocation=allocation,
        recompute=recompute,
        metric_for_best_model="lost" if judge else None,
        greater_is_better=False,
        per_device_train_batch_size=forward_size,
        per_device_eval_batch_size=forward_size,
        gradient_accumulation_steps=batch_size // (forward_size * state.num_processes),
        num_train_epochs=epochs,
        max_steps=max_steps,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_steps=save_steps,
        save_total_limit=2,
        logging_steps=20,
        report_to=[],
        seed=seed,
        use_cpu=place == "cpu",
        # DeepSpeed wants one type for all weights that it trains with.
        bf16=deepspeed and dtype == "bfloat16",
    )

    class NoteOfArguments(TrainerCallback):
        """Left after the first step, before any checkpoint: what fails until then may be tried with others."""

        def on_step_end(self, *states: Any, **rest: Any) -> None:
            run.begin()

    with naming(checkpoints):
        trainer = LookaheadTrainer(
            peft_model,
            arguments,
            judge=judge,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[NoteOfArguments()],
        )
        trainer.train(resume_from_checkpoint=last)
        step = trainer.load_best()
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        with trainer.checkpoints_of_the_adapter():
            if state.is_main_process:
                save_adapter(peft_model, out)
                write_training_record(out, {"steps": step, "of": trainer.state.global_step, **options}, metrics)
        profile = None
        if measured_budgets and not deepspeed:
            held_out = [row["input_ids"] for row in load_targets(targets[0] / "validation")]
            long_enough = [prompt for prompt in held_out if len(prompt) >= MOST * min(measured_budgets)]
            # Every process reads the same prompts: where the model is sharded, a forward needs all of them.
            profile = measure_profile(
                peft_model.eval(), long_enough[:profile_prompts], measured_budgets, progress=state.is_main_process
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


def _share(batch_size: int, processes: int) -> int:
    """Each process's part of a step.

    Raises:
        ValueError: not a whole one.
    """
    if batch_size < 1 or batch_size % processes:
        raise ValueError(f"--batch-size {batch_size} cannot be divided among {processes} processes; pass a multiple")
    return batch_size // processes


def _largest_divisor(number: int, limit: int) -> int:
    if limit < 1:
        raise ValueError(f"--device-batch-size must be at least 1, got {limit}")
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)
