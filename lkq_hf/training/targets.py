"""The model's own responses to the training prompts, written in pieces so that a stopped run goes on where it was."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from pyarrow import parquet
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lkq_hf.cache.whole_text import NewCache, writing_whole_texts
from lkq_hf.runs import Run, read_piece
from lkq_hf.training.data import TargetCollator

SHARDS = "shard-*.parquet"
"""Pattern of the shards' names."""

INDEX = "prompt_index"
"""Column of the shards that holds the place of a prompt among all of them."""


def generate_targets(
    model: PreTrainedModel,
    prompts: Sequence[dict[str, Any]] | Dataset,
    output_dir: str | os.PathLike[str],
    max_new_tokens: int = 512,
    batch_tokens: int = 65_536,
    shard_size: int = 512,
    process_index: int = 0,
    num_processes: int = 1,
    model_note: dict[str, Any] | None = None,
) -> Dataset:
    """Greedy responses of ``model`` to ``prompts``, as a data set with ``"input_ids"`` and ``"response_ids"``.

    Work is done in shards of prompts of similar length, so that batches are large and have little padding. A finished
    shard is a file in ``output_dir``; a run that finds it there does not make it again, so a stopped run is resumed by
    starting it again with the same arguments.

    Where there is much to answer, a GPU decodes by a compiled loop (`writing_whole_texts`).

    Args:
        model: the base model, on the device to use. Adapters take no part.
        prompts: mappings with ``"input_ids"``; other columns are kept if they hold numbers or text. Where
            ``"response_ids"`` are given and not empty, the model is not asked.
        output_dir: directory for the shards.
        max_new_tokens: longest response, in tokens.
        batch_tokens: prompt and response tokens in one batch; prompts of similar length share one.
        shard_size: prompts per shard.
        process_index: which share of the shards this process makes.
        num_processes: the number of shares.
        model_note: what tells the model from others, as JSON; by default its name, its revision and its data type.

    Returns:
        The data set of all finished shards, in the order of the prompts; in a group of processes, of everyone's.

    Raises:
        ValueError: no prompts, or the directory holds shards of another model, another set of prompts or other
            arguments, or a damaged one.
    """
    if len(prompts) == 0:
        raise ValueError("there are no prompts to respond to")
    directory = Path(output_dir)
    if model_note is None:
        revision = getattr(model.config, "_commit_hash", None)
        model_note = {"model": model.name_or_path, "revision": revision, "dtype": str(model.dtype)}
    recipe = {"prompts": len(prompts), "max_new_tokens": max_new_tokens, "shard_size": shard_size, **model_note}
    run = Run(directory, recipe, SHARDS)
    starts = range(0, len(prompts), shard_size)
    mine = [start for index, start in enumerate(starts) if index % num_processes == process_index]
    lengths, given = zip(
        *((len(prompt["input_ids"]), bool(prompt.get("response_ids"))) for prompt in prompts), strict=True
    )
    by_length = sorted(range(len(prompts)), key=lengths.__getitem__)
    tokens = sum(length + max_new_tokens for length, has in zip(lengths, given, strict=True) if not has)
    # Of all processes, so that any number of them answers in the same way.
    steps = max_new_tokens * tokens / batch_tokens
    with (
        writing_whole_texts(model, steps) as new_cache,
        tqdm(total=len(prompts), desc="responses", unit="prompt", disable=process_index > 0) as progress,
    ):
        for start in mine:
            rows = [{**prompts[index], INDEX: index} for index in by_length[start : start + shard_size]]
            name = f"shard-{start:08d}.parquet"
            if name not in run:
                answered = _respond(model, rows, max_new_tokens, batch_tokens, new_cache)
                run.write(name, Dataset.from_list(answered).to_parquet)
            elif run.read(name, _read_prompts) != [list(row["input_ids"]) for row in rows]:
                raise ValueError(
                    f"{directory / name} holds responses to other prompts: name another directory, or delete this one"
                )
            progress.update(len(rows))
    grouped = torch.distributed.is_initialized()
    if num_processes > 1 and grouped:
        PartialState().wait_for_everyone()
    if process_index == 0 and (num_processes == 1 or grouped):  # otherwise others may be at work still
        run.remove_partial()
    return load_targets(directory)


def load_targets(output_dir: str | os.PathLike[str]) -> Dataset:
    """The data set of all finished shards in a directory, in the order of the prompts.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one is damaged.
    """
    shards = sorted(Path(output_dir).glob(SHARDS))
    if not shards:
        raise FileNotFoundError(f"{output_dir} holds no responses ({SHARDS}); run generate_targets first")
    for shard in shards:
        read_piece(shard, _check_whole)
    targets = concatenate_datasets([Dataset.from_parquet(str(shard)) for shard in shards])
    return targets.sort(INDEX).remove_columns(INDEX) if INDEX in targets.column_names else targets


def _check_whole(path: Path) -> None:
    """Raises ValueError for a shard that is not whole, as far as its last bytes tell."""
    try:
        parquet.read_metadata(path)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _read_prompts(path: Path) -> list[list[int]]:
    try:
        return parquet.read_table(path, columns=["input_ids"]).column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _respond(
    model: PreTrainedModel, rows: list[dict[str, Any]], max_new_tokens: int, batch_tokens: int, new_cache: NewCache
) -> list[dict[str, Any]]:
    eos = model.generation_config.eos_token_id
    stops = set(eos if isinstance(eos, list) else [eos])
    responses: dict[int, list[int]] = {
        index: list(row["response_ids"]) for index, row in enumerate(rows) if row.get("response_ids")
    }
    unanswered = [index for index in range(len(rows)) if index not in responses]
    for places in _batches([len(rows[index]["input_ids"]) for index in unanswered], max_new_tokens, batch_tokens):
        indices = [unanswered[place] for place in places]
        batch = TargetCollator()([{**rows[index], "response_ids": [0]} for index in indices])
        input_ids = batch["input_ids"].to(model.device)
        with torch.no_grad():
            output: Any = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=batch["attention_mask"].long().to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=model.generation_config.pad_token_id or 0,
                past_key_values=new_cache(max_new_tokens),
            )
        for index, tokens in zip(indices, output[:, input_ids.shape[1] :].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
            responses[index] = tokens[:end]
    return [
        {**{name: value for name, value in row.items() if isinstance(value, int | float | str | list)}}
        | {"response_ids": responses[index]}
        for index, row in enumerate(rows)
    ]


def _batches(lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, each of at most ``batch_tokens`` tokens, padding included."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = (len(batch) + 1) * (lengths[index] + max_new_tokens) > batch_tokens
        # A batch without padding runs without a mask, which is worth more than a larger batch.
        uneven = len(batch) >= 16 and lengths[index] != lengths[batch[0]]
        if batch and (full or uneven):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
