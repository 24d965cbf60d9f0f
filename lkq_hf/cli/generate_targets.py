"""``lkq-hf generate-targets``: prompts from documents, and the model's own responses to them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lkq_hf.cli.checks import check_dtype, check_model_directory, check_writable
from lkq_hf.cli.options import Device, Dtype, Model, check_model, find_device, load_model, model_config, model_note
from lkq_hf.cli.output import AsJson, report
from lkq_hf.runs import NOTE, Run

LONGEST_PROMPT = 8192
NEW_TOKENS = 128
COUNT = 8000


def generate_targets(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the training and validation sets.")],
    documents: Annotated[
        list[Path] | None,
        typer.Option(help="Documents: jsonl or jsonl.gz with a 'text' each, or plain text files.", dir_okay=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Your own prompts instead: jsonl with 'messages' (a chat) or 'text' each.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Training prompts to make.", min=1)] = COUNT,
    validation_count: Annotated[
        int, typer.Option(help="Validation prompts, from documents held out whole.", min=1)
    ] = 256,
    validation_fraction: Annotated[float, typer.Option(help="Share of documents (or prompts) held out.")] = 0.05,
    min_length: Annotated[int, typer.Option(help="Shortest prompt, in tokens.")] = 512,
    max_length: Annotated[
        int | None, typer.Option(help="Longest prompt, in tokens. By default 8192, or the model's positions if fewer.")
    ] = None,
    length_step: Annotated[int, typer.Option(help="Prompt lengths are multiples of this.", min=1)] = 256,
    mix: Annotated[
        str, typer.Option(help="Further fields of lkq_hf.training.PromptMix, as JSON: '{\"length_skew\": 0}'.")
    ] = "{}",
    max_new_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.", min=1)] = NEW_TOKENS,
    shard_size: Annotated[
        int, typer.Option(help="Prompts per file; a stopped run repeats at most one file.", min=1)
    ] = 512,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens in a batch, prompts and responses together.", min=1)
    ] = 65_536,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that build prompts.", min=1)] = 1,
    prompts_only: Annotated[
        bool, typer.Option(help="Only build the prompts, which needs no GPU; the same command without this goes on.")
    ] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make training data: prompts and the model's answers.

    The prompts of a lookahead adapter's training are made from documents, or are your own.

    A run that was stopped goes on where it was when it is started again. Under `accelerate launch`, the responses are
    divided among the processes.
    """
    written = make_targets(
        model=model,
        out=out,
        documents=documents,
        prompts=prompts,
        count=count,
        validation_count=validation_count,
        validation_fraction=validation_fraction,
        min_length=min_length,
        max_length=max_length,
        length_step=length_step,
        mix=mix,
        max_new_tokens=max_new_tokens,
        shard_size=shard_size,
        batch_tokens=batch_tokens,
        seed=seed,
        workers=workers,
        prompts_only=prompts_only,
        dtype=dtype,
        device=device,
    )
    if written:
        kind = "prompts" if prompts_only else "prompts with responses"
        lines = [f"{name}: {made['prompts']} {kind} in {made['directory']}" for name, made in written.items()]
        report("\n".join(lines), written)


def make_targets(
    *,
    model: str,
    out: Path,
    documents: list[Path] | None = None,
    prompts: Path | None = None,
    count: int = COUNT,
    validation_count: int = 256,
    validation_fraction: float = 0.05,
    min_length: int = 512,
    max_length: int | None = None,
    length_step: int = 256,
    mix: str = "{}",
    max_new_tokens: int = NEW_TOKENS,
    shard_size: int = 512,
    batch_tokens: int = 65_536,
    seed: int = 0,
    workers: int = 1,
    prompts_only: bool = False,
    dtype: str = "bfloat16",
    device: str | None = None,
) -> dict[str, dict[str, Any]]:
    """What the command does, with its options.

    Returns:
        For each set its directory and its number of prompts; nothing in processes other than the first.
    """
    if (documents is None) == (prompts is None):
        raise ValueError("pass either --documents, to make prompts from, or --prompts")
    if prompts_only and documents is None:
        raise ValueError("--prompts-only builds prompts from --documents")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"--validation-fraction must lie between 0 and 1, got {validation_fraction}")
    missing = [path for path in documents or [] if not path.exists()]
    if missing and not (out / NOTE).exists():  # of prompts that are built already nobody needs them
        raise FileNotFoundError(f"there is no file {missing[0]}; expected documents")
    check_dtype(dtype)
    check_model_directory(model)
    check_writable(out)

    from transformers import AutoTokenizer

    from lkq_hf.evaluation.positions import check_positions
    from lkq_hf.training.prompts import PromptMix
    from lkq_hf.training.targets import generate_targets as respond

    if not prompts_only:
        state, place = find_device(device)
    check_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = model_config(model)
    if prompts is not None:
        sets = _own_prompts(prompts, tokenizer, validation_fraction, seed)
        longest = max(len(row["input_ids"]) for rows in sets.values() for row in rows)
        check_positions(config, longest)
    else:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = max_length if max_length is not None else min(LONGEST_PROMPT, positions or LONGEST_PROMPT)
        fields = {"min_length": min_length, "max_length": longest, "length_step": length_step, **_fields(mix)}
        PromptMix(**fields)
        check_positions(config, fields["max_length"])
        recipe = {
            "documents": [path.name for path in documents or []],
            "count": count,
            "validation_count": validation_count,
            "validation_fraction": validation_fraction,
            "seed": seed,
            "mix": fields,
            "tokenizer": _digest(tokenizer),
        }
        sets = _saved_prompts(
            out,
            recipe,
            lambda: _built_prompts(
                documents or [], tokenizer, count, validation_count, validation_fraction, seed, workers, fields
            ),
        )
    if prompts_only:
        return {name: {"directory": out / name, "prompts": len(rows)} for name, rows in sets.items()}
    causal_lm, _ = load_model(model, dtype, place)
    note = model_note(model, causal_lm, dtype)
    written = {}
    for name, rows in sets.items():
        targets = respond(
            causal_lm,
            rows,
            out / name,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            shard_size=shard_size,
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


def _built_prompts(
    documents: list[Path],
    tokenizer: Any,
    count: int,
    validation_count: int,
    validation_fraction: float,
    seed: int,
    workers: int,
    mix: dict[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    from lkq_hf.text.documents import read_documents
    from lkq_hf.training.prompts import PromptMix, build_prompts_in_parallel, split_documents

    # Not by the seed: sets of several seeds, trained on together, hold the same documents out.
    train, validation = split_documents(read_documents(documents), validation_fraction)
    sets = {}
    for name, part, size, part_seed in (
        ("validation", validation, validation_count, seed + 1),
        ("train", train, count, seed),
    ):
        built = build_prompts_in_parallel(part, tokenizer, size, PromptMix(**mix, seed=part_seed), workers)
        sets[name] = [{"input_ids": prompt["input_ids"], "kind": prompt["kind"]} for prompt in built]
    return sets


def _fields(mix: str) -> dict[str, Any]:
    from lkq_hf.training.prompts import PromptMix

    known = [field.name for field in dataclasses.fields(PromptMix) if field.name != "seed"]
    try:
        fields = json.loads(mix)
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict) or not set(fields) <= set(known):
        raise ValueError(f"--mix must be a JSON object with some of {', '.join(known)}; got {mix}")
    return fields


def _own_prompts(path: Path, tokenizer: Any, validation_fraction: float, seed: int) -> dict[str, list[dict[str, Any]]]:
    import random

    from lkq_hf.text.documents import read_prompts

    rows = [{"input_ids": ids} for ids in read_prompts(path, tokenizer)]
    random.Random(seed).shuffle(rows)
    held_out = min(max(1, round(validation_fraction * len(rows))), len(rows) - 1)
    return {"validation": rows[:held_out], "train": rows[held_out:]}
