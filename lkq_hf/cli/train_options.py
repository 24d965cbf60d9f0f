"""The options of ``lkq-hf train``. The defaults are the best of the recorded runs (docs/training-an-adapter.md)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lkq_hf.cli.dataclass_command import InFile, Shown
from lkq_hf.cli.options import Model
from lkq_hf.cli.target_options import TargetOptions


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Each option once: its name, type, default and meaning."""

    model: Model
    out: Annotated[Path, typer.Option(help="Directory for the adapter; checkpoints go to its 'checkpoints' folder.")]
    documents: Annotated[
        list[Path] | None,
        Shown(
            "Make the targets first, in the 'targets' folder of --out, from these documents: jsonl or jsonl.gz with a "
            "'text' each, or plain text files.",
            dir_okay=False,
        ),
    ] = None
    targets: Annotated[
        list[Path] | None,
        Shown(
            "Instead, a directory that generate-targets wrote; with several, the first one validates.",
            exists=True,
            file_okay=False,
        ),
    ] = None
    count: Annotated[int, Shown("With --documents: training prompts to make.", min=1)] = TargetOptions.count
    max_length: Annotated[
        int | None,
        Shown("With --documents: longest prompt, in tokens. By default 8192, or the model's positions if fewer."),
    ] = None
    max_new_tokens: Annotated[int, InFile("With --documents: longest response, in tokens.", min=1)] = (
        TargetOptions.max_new_tokens
    )
    adapter: Annotated[
        Path | None, Shown("Go on from this trained adapter, whose shape is kept.", exists=True, file_okay=False)
    ] = None
    base_model_name: Annotated[
        str | None, InFile("Name of the base model that the adapter records, if not MODEL.")
    ] = None
    num_lookahead_tokens: Annotated[int, InFile("Learned tokens.", min=1)] = 32
    rank: Annotated[int, InFile("Rank of the LoRA.", min=1)] = 8
    lora_alpha: Annotated[float, InFile("The LoRA's update is scaled by lora_alpha / rank.")] = 32
    lora: Annotated[bool, InFile("Train a LoRA on the lookahead positions beside the tokens.")] = True
    row_power: Annotated[float, InFile("Exponent of the mean over the learned tokens; 1: paper.")] = 2.0
    pooling_kernel_size: Annotated[int, InFile("Pooling that the adapter's config recommends.")] = 1
    pooling: Annotated[str, InFile("How it pools: max, avg or sum.")] = "max"
    neighbor_weight: Annotated[float, InFile("What a neighbor counts, with pooling sum.")] = 1.0
    importance_heads: Annotated[str, InFile("Heads whose importance is compared: query or kv.")] = "query"
    importance_power: Annotated[float, InFile("Power of the importance; 1 as in the paper.")] = 1.5
    eviction_weight: Annotated[
        float, InFile("Weight of what the response loses over the evicted cache; 0: paper.")
    ] = 0.5
    allocation: Annotated[
        str, InFile("How that cache shares its budget out: global, layer or uniform, as the adapter is used.")
    ] = "global"
    recompute: Annotated[bool, InFile("Read each layer again in the backward pass: less memory, slower steps.")] = True
    inside_answer_share: Annotated[
        float, InFile("Share of the prompts that end inside the model's own answer.", min=0, max=1)
    ] = 0.2
    cut_loops: Annotated[
        bool, InFile("Cut responses where they begin to repeat themselves, as small models' often do.")
    ] = True
    max_repetition: Annotated[
        float, InFile("Leave out responses of which a larger share repeats itself (0.3 drops loops).")
    ] = 1.0
    learning_rate: Annotated[float, InFile("Peak learning rate.")] = 3e-3
    batch_size: Annotated[int, Shown("Prompts per step, over all processes.", min=1)] = 32
    device_batch_size: Annotated[
        int | None,
        Shown("Most prompts in a forward of one device. By default as many as its memory holds, up to 32.", min=1),
    ] = None
    epochs: Annotated[float, Shown("Passes over the training set.")] = 1.0
    max_steps: Annotated[int, InFile("Steps; overrides epochs if positive.")] = -1
    eval_steps: Annotated[int, InFile("Steps between two evaluations, whose best one gives the adapter.", min=1)] = 50
    save_steps: Annotated[int, InFile("Steps between two checkpoints.", min=1)] = 50
    judge_prompts: Annotated[
        int, InFile("Validation prompts that choose the best evaluation, at most; 0: the last step.", min=0)
    ] = 128
    profile_budgets: Annotated[
        str, InFile("Budgets for which the mean numbers per head are measured at the end; empty for none.")
    ] = "64,128,256,512,1024"
    profile_prompts: Annotated[int, InFile("Validation prompts to measure them on, at most.", min=1)] = 64
    seed: Annotated[int, InFile("Seed.")] = 0
    dtype: Annotated[str, Shown("Data type of the model's weights: float32, bfloat16 or float16.")] = "bfloat16"
    device: Annotated[str | None, Shown("Device, such as cuda or cpu; by default the best there is.")] = None
