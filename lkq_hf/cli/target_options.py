"""The options of ``lkq-hf generate-targets``."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from lkq_hf.cli.dataclass_command import Shown
from lkq_hf.cli.options import Model


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Each option once: its name, type, default and meaning."""

    model: Model
    out: Annotated[Path, typer.Option(help="Directory for the training and validation sets.")]
    documents: Annotated[
        list[Path] | None,
        Shown("Documents: jsonl or jsonl.gz with a 'text' each, or plain text files.", dir_okay=False),
    ] = None
    prompts: Annotated[
        Path | None,
        Shown("Your own prompts instead: jsonl with 'messages' (a chat) or 'text' each.", exists=True, dir_okay=False),
    ] = None
    count: Annotated[int, Shown("Training prompts to make.", min=1)] = 8000
    validation_count: Annotated[int, Shown("Validation prompts, from documents held out whole.", min=1)] = 256
    validation_fraction: Annotated[float, Shown("Share of documents (or prompts) held out.")] = 0.05
    min_length: Annotated[int, Shown("Shortest prompt, in tokens.")] = 512
    max_length: Annotated[
        int | None, Shown("Longest prompt, in tokens. By default 8192, or the model's positions if fewer.")
    ] = None
    length_step: Annotated[int, Shown("Prompt lengths are multiples of this.", min=1)] = 256
    mix: Annotated[str, Shown("Further fields of lkq_hf.training.PromptMix, as JSON: '{\"length_skew\": 0}'.")] = "{}"
    max_new_tokens: Annotated[int, Shown("Longest response, in tokens.", min=1)] = 128
    shard_size: Annotated[int, Shown("Prompts per file; a stopped run repeats at most one file.", min=1)] = 512
    batch_tokens: Annotated[int, Shown("Tokens in a batch, prompts and responses together.", min=1)] = 65_536
    seed: Annotated[int, Shown("Seed of the prompts.")] = 0
    workers: Annotated[int, Shown("Processes that build prompts.", min=1)] = 1
    prompts_only: Annotated[
        bool, Shown("Only build the prompts, which needs no GPU; the same command without this goes on.")
    ] = False
    dtype: Annotated[str, Shown("Data type of the model's weights: float32, bfloat16 or float16.")] = "bfloat16"
    device: Annotated[str | None, Shown("Device, such as cuda or cpu; by default the best there is.")] = None

    @classmethod
    def like(cls, options: object, **others: Any) -> "TargetOptions":
        """Those of other options that have the same names, but for ``others``."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(options).items() if name in names} | others)
