"""``lkq-hf profile``: how many entries each head of an adapter's model keeps on average."""

from pathlib import Path
from typing import Annotated

import typer

from lkq_hf.cli.checks import whole_numbers
from lkq_hf.cli.options import Device, Dtype, Model, find_device, load_model
from lkq_hf.cli.output import AsJson, report


def profile(
    model: Model,
    adapter: Annotated[
        Path, typer.Option(help="Directory of the adapter; its adapter_config.json is rewritten.", file_okay=False)
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Texts to make prompts from: plain files, or jsonl(.gz) with a 'text' each.", exists=True),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Your own prompts instead: jsonl with 'messages' or 'text' each.", exists=True)
    ] = None,
    budgets: Annotated[str, typer.Option(help="Budgets, in entries per KV head.")] = "64,128,256,512,1024",
    count: Annotated[int, typer.Option(help="Prompts to make, or to read at most.", min=1)] = 64,
    min_length: Annotated[int, typer.Option(help="Shortest prompt to make, in tokens.")] = 2048,
    max_length: Annotated[int, typer.Option(help="Longest prompt to make, in tokens.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Measure how many entries each head keeps.

    LookaheadCache(allocation="profile") keeps these numbers. They are means of what allocation="global" keeps of
    prompts at least four times as long as the budget. Use texts that the adapter was not trained on. `lkq-hf train`
    measures them on its validation prompts.
    """
    from lkq_hf.cache.allocation import MOST
    from lkq_hf.evaluation.profile import measure_profile, write_profile
    from lkq_hf.hub import load_adapter
    from lkq_hf.text.documents import read_documents, read_prompts
    from lkq_hf.training.prompts import PromptMix, build_prompts

    if (text is None) == (prompts is None):
        raise ValueError("pass either --text, to make prompts from, or --prompts")
    measured = whole_numbers("--budgets", budgets)
    if not measured:
        raise ValueError("--budgets expects at least one budget, as in 64,128")
    _, place = find_device(device)
    causal_lm, tokenizer = load_model(model, dtype, place)
    load_adapter(causal_lm, adapter)
    if prompts is not None:
        rows = read_prompts(prompts, tokenizer)[:count]
    else:
        mix = PromptMix(min_length=min_length, max_length=max_length, seed=seed)
        documents = read_documents(text or [])
        rows = [prompt["input_ids"] for prompt in build_prompts(documents, tokenizer, count, mix)]
    found = measure_profile(causal_lm, rows, measured)
    if found is None:
        raise ValueError(
            f"no prompt is {MOST} times as long as the smallest budget, {min(measured)} entries: pass longer prompts, "
            "or smaller budgets"
        )
    write_profile(adapter, found)
    lines = []
    for budget, layers in found.items():
        shares = [share for layer in layers for share in layer]
        lines.append(f"budget {budget}: heads keep from {min(shares):.2f} to {max(shares):.2f} times the mean")
    report("\n".join([*lines, f"Wrote {adapter / 'adapter_config.json'}"]), {"adapter": adapter, "profile": found})
