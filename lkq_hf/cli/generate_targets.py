"""``lkq-hf generate-targets``: prompts from documents, and the model's own responses to them."""

from pathlib import Path
from typing import Annotated

import typer

from lkq_hf.cli.options import Device, Dtype, Model, load_model


def generate_targets(
    model: Model,
    documents: Annotated[
        list[Path], typer.Option(help="Documents: jsonl or jsonl.gz with a 'text' each, or plain text files.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the training and validation sets.")],
    count: Annotated[int, typer.Option(help="Training prompts to make.")] = 8000,
    validation_count: Annotated[int, typer.Option(help="Validation prompts, from documents held out whole.")] = 256,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents that is held out.")] = 0.05,
    min_length: Annotated[int, typer.Option(help="Shortest prompt, in tokens.")] = 512,
    max_length: Annotated[int, typer.Option(help="Longest prompt, in tokens.")] = 8192,
    length_step: Annotated[int, typer.Option(help="Prompt lengths are multiples of this.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, prompts and responses together.")] = 65_536,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that build prompts.")] = 1,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Make training data for a lookahead adapter: prompts from documents, answered by the model itself.

    A run that was stopped goes on where it was when it is started again. Under `accelerate launch`, the responses are
    divided among the processes.
    """
    from accelerate import PartialState

    from lkq_hf.text.documents import read_documents
    from lkq_hf.training.prompts import PromptMix, build_prompts_in_parallel, split_documents
    from lkq_hf.training.targets import generate_targets as respond

    state = PartialState()
    causal_lm, tokenizer = load_model(model, dtype, device or str(state.device))
    train, validation = split_documents(read_documents(documents), validation_fraction, seed)
    for name, part, size, part_seed in (
        ("validation", validation, validation_count, seed + 1),
        ("train", train, count, seed),
    ):
        mix = PromptMix(min_length=min_length, max_length=max_length, length_step=length_step, seed=part_seed)
        prompts = build_prompts_in_parallel(part, tokenizer, size, mix, workers)
        rows = [{"input_ids": prompt["input_ids"], "kind": prompt["kind"]} for prompt in prompts]
        targets = respond(
            causal_lm,
            rows,
            out / name,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            process_index=state.process_index,
            num_processes=state.num_processes,
        )
        typer.echo(f"{name}: {len(targets)} prompts with responses in {out / name}")
