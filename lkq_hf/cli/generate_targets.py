"""``lkq-hf generate-targets``: prompts from documents, and the model's own responses to them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lkq_hf.cli.checks import check_dtype, check_model_directory, check_writable
from lkq_hf.cli.dataclass_command import dataclass_command
from lkq_hf.cli.options import check_model, find_device, load_model, model_config, model_note
from lkq_hf.cli.output import report
from lkq_hf.cli.target_options import TargetOptions
from lkq_hf.runs import NOTE, Run

LONGEST_PROMPT = 8192


def run(options: TargetOptions) -> None:
    """Make training data: prompts and the model's answers.

    The prompts of a lookahead adapter's training are made from documents, or are your own.

    A run that was stopped goes on where it was when it is started again. Under `accelerate launch`, the responses are
    divided among the processes.
    """
    written = make_targets(options)
    if written:
        kind = "prompts" if options.prompts_only else "prompts with responses"
        lines = [f"{name}: {made['prompts']} {kind} in {made['directory']}" for name, made in written.items()]
        report("\n".join(lines), written)


generate_targets = dataclass_command(TargetOptions, run)


def make_targets(options: TargetOptions) -> dict[str, dict[str, Any]]:
    """What the command does.

    Returns:
        For each set its directory and its number of prompts; nothing in processes other than the first.
    """
    out, dtype = options.out, options.dtype
    if (options.documents is None) == (options.prompts is None):
        raise ValueError("pass either --documents, to make prompts from, or --prompts")
    if options.prompts_only and options.documents is None:
        raise ValueError("--prompts-only builds prompts from --documents")
    if not 0 < options.validation_fraction < 1:
        raise ValueError(f"--validation-fraction must lie between 0 and 1, got {options.validation_fraction}")
    missing = [path for path in options.documents or [] if not path.exists()]
    if missing and not (out / NOTE).exists():  # of prompts that are built already nobody needs them
        raise FileNotFoundError(f"there is no file {missing[0]}; expected documents")
    check_dtype(dtype)
    check_model_directory(options.model)
    check_writable(out)

    from transformers import AutoTokenizer

    from lkq_hf.evaluation.positions import check_positions
    from lkq_hf.training.targets import generate_targets as respond

    if not options.prompts_only:
        state, place = find_device(options.device)
    check_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = model_config(options.model)
    if options.prompts is not None:
        sets = _own_prompts(options.prompts, tokenizer, options.validation_fraction, options.seed)
        longest = max(len(row["input_ids"]) for rows in sets.values() for row in rows)
        check_positions(config, longest)
    else:
        mix = _mix(options, getattr(config.get_text_config(), "max_position_embeddings", None))
        check_positions(config, mix["max_length"])
        recipe = {
            "documents": [path.name for path in options.documents or []],
            "count": options.count,
            "validation_count": options.validation_count,
            "validation_fraction": options.validation_fraction,
            "seed": options.seed,
            "mix": mix,
            "tokenizer": _digest(tokenizer),
        }
        sets = _saved_prompts(out, recipe, lambda: _built_prompts(options, tokenizer, mix))
    if options.prompts_only:
        return {name: {"directory": out / name, "prompts": len(rows)} for name, rows in sets.items()}
    causal_lm, _ = load_model(options.model, dtype, place)
    note = model_note(options.model, causal_lm, dtype)
    written = {}
    for name, rows in sets.items():
        targets = respond(
            causal_lm,
            rows,
            out / name,
            max_new_tokens=options.max_new_tokens,
            batch_tokens=options.batch_tokens,
            shard_size=options.shard_size,
            process_index=state.process_index,
            num_processes=state.num_processes,
            model_note=note,
        )
        written[name] = {"directory": out / name, "prompts": len(targets)}
    return written if state.is_main_process else {}


def _saved_prompts(out: Path, recipe: dict[str, Any], build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The prompts that an earlier run left in ``out``, or those that ``build`` makes, which are left there.

    Raises:
        ValueError: the earlier run was asked for others.
    """
    from datasets import Dataset

    files = {name: f"{name}/prompts.parquet" for name in ("validation", "train")}
    run = Run(out, recipe, "*/prompts.parquet")
    if not all(file in run for file in files.values()):
        for name, rows in build().items():
            run.write(files[name], Dataset.from_list(rows).to_parquet)
    return {name: run.read(file, lambda path: Dataset.from_parquet(str(path))) for name, file in files.items()}


def _digest(tokenizer: Any) -> str:
    """Of what prompts depend on; the same on another machine, whatever the model is called there."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return hashlib.sha256(content.encode()).hexdigest()


def _built_prompts(options: TargetOptions, tokenizer: Any, mix: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    from lkq_hf.text.documents import read_documents
    from lkq_hf.training.prompts import PromptMix, build_prompts_in_parallel, split_documents

    # Not by the seed: sets of several seeds, trained on together, hold the same documents out.
    train, validation = split_documents(read_documents(options.documents or []), options.validation_fraction)
    sets = {}
    held_out = f"the {options.validation_fraction:.0%} of the documents that are held out for validation"
    for name, part, size, part_seed, what in (
        ("validation", validation, options.validation_count, options.seed + 1, held_out),
        ("train", train, options.count, options.seed, "the documents to train on"),
    ):
        try:
            built = build_prompts_in_parallel(part, tokenizer, size, PromptMix(**mix, seed=part_seed), options.workers)
        except ValueError as error:
            raise ValueError(f"{what}: {error} (--max-length)") from error
        rows = [{"input_ids": prompt["input_ids"], "kind": prompt["kind"]} for prompt in built]
        if mix.get("asked_later_share"):
            rows = [{**row, "response_ids": prompt["response_ids"]} for row, prompt in zip(rows, built, strict=True)]
        sets[name] = rows
    return sets


def _mix(options: TargetOptions, positions: int | None) -> dict[str, Any]:
    """The fields of the prompts' mix.

    Raises:
        ValueError: --mix is something else, or a value is out of range.
    """
    from lkq_hf.training.prompts import PromptMix

    known = [field.name for field in dataclasses.fields(PromptMix) if field.name != "seed"]
    try:
        fields = json.loads(options.mix)
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict) or not set(fields) <= set(known):
        raise ValueError(f"--mix must be a JSON object with some of {', '.join(known)}; got {options.mix}")
    longest = options.max_length
    if longest is None:
        longest = min(LONGEST_PROMPT, positions or LONGEST_PROMPT)
    mix = {"min_length": options.min_length, "max_length": longest, "length_step": options.length_step, **fields}
    PromptMix(**mix)
    return mix


def _own_prompts(path: Path, tokenizer: Any, validation_fraction: float, seed: int) -> dict[str, list[dict[str, Any]]]:
    import random

    from lkq_hf.text.documents import read_prompts

    rows = [{"input_ids": ids} for ids in read_prompts(path, tokenizer)]
    random.Random(seed).shuffle(rows)
    held_out = min(max(1, round(validation_fraction * len(rows))), len(rows) - 1)
    return {"validation": rows[:held_out], "train": rows[held_out:]}
