"""``lkq-hf quantize``: a quantized checkpoint from a base model."""

from pathlib import Path
from typing import Annotated

import typer

from lkq_hf.cli.checks import (
    BITS,
    PRESETS,
    check_choice,
    check_dataset,
    check_dtype,
    check_model_directory,
    check_size,
    check_writable,
)
from lkq_hf.cli.options import Device, Model, check_model, find_device
from lkq_hf.cli.output import AsJson, report
from lkq_hf.files import check_free


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint; must not exist or be empty.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: a text or .jsonl file, or a dataset id on the Hub; none with --own-text 1."
        ),
    ] = None,
    bits: Annotated[
        float,
        typer.Option(
            help="Bits per weight: 2, 3, 4 or 8. A fraction, as in 3.2, is a mean: each layer gets a width of its "
            "own (experimental).",
            min=2,
            max=8,
        ),
    ] = 4,
    target_size: Annotated[
        str | None,
        typer.Option(
            help="Instead of --bits: the largest size of all weights, as in 4.5GiB; widths by layer (experimental)."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Input features that share a scale, -1 for a row. By default the largest of 128, 64, 32 that fits."
        ),
    ] = None,
    sym: Annotated[bool, typer.Option("--sym/--no-sym", help="Symmetric zero points.")] = True,
    preset: Annotated[
        str,
        typer.Option(
            help="default (quick and strong), paper (as published), or refined (loses least: the default, then blocks "
            "and scales by gradient; wants a GPU)."
        ),
    ] = "default",
    own_text: Annotated[
        float | None,
        typer.Option(
            help="Share of the calibration windows that the model writes itself, against losses on texts that are "
            "unlike the dataset; 1 needs no dataset. By default 0.5 with --preset refined, 0 with others.",
            min=0,
            max=1,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    model_seqlen: Annotated[int, typer.Option(help="Tokens in a calibration window.", min=1)] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows that run through a block at once.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the calibration windows.")] = 0,
    text_column: Annotated[str, typer.Option(help="Field of the texts.")] = "text",
    modules_to_not_convert: Annotated[
        list[str] | None, typer.Option(help="Name or part of a name to leave alone; may be repeated.")
    ] = None,
    block_by_block: Annotated[
        bool, typer.Option("--block-by-block", help="Read one block at a time: for models larger than memory.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Data type of all other weights; auto for the base model's.")] = "auto",
    base_model_name: Annotated[
        str | None, typer.Option(help="Name of the base model that the checkpoint records, if not MODEL.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and save it with its tokenizer.

    A run that was stopped goes on after its last finished block when it is started again. Under `accelerate launch`,
    the calibration samples and the rows of every layer are divided among the processes.
    """
    check_dtype(dtype, "auto")
    if bits.is_integer():
        check_choice("--bits", int(bits), BITS)
    if target_size is not None:
        check_size("--target-size", target_size)
    check_choice("--preset", preset, PRESETS)
    check_dataset(dataset, own_text)
    check_free(out)
    check_writable(out)
    check_model_directory(model, quantized=False)

    from lkq_hf.quantization import TwoStageQuantizer

    state, place = find_device(device)
    check_model(model, quantized=False)
    quantizer = TwoStageQuantizer.from_pretrained(model, dtype=dtype)
    quantized = quantizer.quantize(
        out,
        block_by_block=block_by_block,
        bits=bits,
        target_size=target_size,
        group_size=group_size,
        sym=sym,
        preset=preset,
        dataset=dataset,
        num_samples=num_samples,
        model_seqlen=model_seqlen,
        text_column=text_column,
        modules_to_not_convert=modules_to_not_convert,
        device=place,
        advanced={"batch_size": batch_size, "seed": seed} | ({} if own_text is None else {"own_text": own_text}),
        meta={"base_model": base_model_name} if base_model_name else None,
    )
    walk = quantizer.report
    if state.is_main_process:
        config = quantized.config.quantization_config
        used = config.group_size
        mean = config.meta.get("mean_bits", config.bits)
        by_layer = ", ".join(f"{width} in {count}" for width, count in config.meta.get("layers_by_bits", {}).items())
        widths = f"{mean:.2f} bits on average ({by_layer} layers)" if by_layer else f"{mean} bits"
        took = f"{walk.seconds:.0f} s on {walk.device}, peak memory {walk.peak_memory / 2**30:.2f} GiB"
        tuned = "" if walk.untuned is None else f"; scales not tuned end to end: {walk.untuned}"
        if (found := walk.end_to_end) is not None:
            kept = "" if found.accepted else " (not kept)"
            tuned = f"; scales tuned, KL on held-out windows {found.before:.3g} before, {found.after:.3g} after{kept}"
        recipe = config.meta["calibration"]
        own = f"; {recipe['written_by_model']} of {recipe['samples']} windows are text of the model's own"
        written = own if recipe["written_by_model"] else ""
        report(
            f"{out}: {widths}, group size {used}; {walk.coverage}{written}{tuned}; {took}",
            {
                "checkpoint": out,
                "bits": mean,
                "group_size": used,
                "quantized_share": walk.coverage.share,
                "in_full_precision": walk.coverage.dense,
                "written_by_model": recipe["written_by_model"],
                "seconds": walk.seconds,
                "device": walk.device,
                "peak_memory_bytes": walk.peak_memory,
                "end_to_end": config.meta.get("end_to_end", {}).get("divergence"),
            },
        )
