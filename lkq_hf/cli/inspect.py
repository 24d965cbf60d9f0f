"""``lkq-hf inspect``: one HTML page about what is kept of one prompt."""

from pathlib import Path
from typing import Annotated

import typer

from lkq_hf.cli.checks import (
    ALLOCATIONS,
    budgets_of,
    check_adapter_directory,
    check_choice,
    check_dtype,
    check_model_directory,
    check_writable,
)
from lkq_hf.cli.options import Allocation, Device, Model, check_adapter, find_device, load_model
from lkq_hf.cli.output import AsJson, report


def inspect(
    model: Model,
    prompt: Annotated[Path, typer.Option(help="Text file with the user's message.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write.", dir_okay=False)],
    adapter: Annotated[
        str | None,
        typer.Option(help="Lookahead adapter: a directory or an id on the Hub. Without one, SnapKV is shown."),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Entries to keep per KV head, or a fraction of the prompt, as in 0.1.")
    ] = "128",
    allocation: Allocation = "global",
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Compare with what the full cache's own answer attends to, and answer.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, for --oracle.", min=1)] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Read the prompt as it is, without the chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Show which tokens of a prompt are kept, in an HTML page.

    It shades the prompt's text, maps layers and heads, shows how many entries each head keeps, and needs no network.
    """
    entries, *more = budgets_of("--budget", budget)
    if more:
        raise ValueError(f"--budget expects one budget, as in 64 or 0.1; got {budget!r}")
    check_choice("--allocation", allocation, ALLOCATIONS)
    check_dtype(dtype)
    check_model_directory(model)
    if adapter is not None:
        check_adapter_directory(adapter)
    check_writable(out)

    from lkq_hf.files import naming
    from lkq_hf.hub import load_adapter
    from lkq_hf.inspection import inspect_eviction, render_report
    from lkq_hf.text.chat import render_chat
    from lkq_hf.text.documents import read_text

    message = read_text(prompt)
    if not message.strip():
        raise ValueError(f"{prompt} is empty; expected the text of a prompt")
    if adapter is not None:
        check_adapter(adapter)
    _, place = find_device(device)
    causal_lm, tokenizer = load_model(model, dtype, place)
    if adapter is not None:
        load_adapter(causal_lm, adapter)
    inspection = inspect_eviction(
        causal_lm,
        tokenizer,
        message if raw else render_chat([{"role": "user", "content": message}], "", tokenizer),
        entries,
        scorers=["lookahead", "snapkv"] if adapter else ["snapkv", "streaming"],
        oracle=oracle,
        allocation=allocation,
        max_new_tokens=max_new_tokens,
        adapter=adapter and Path(adapter).name,
        add_special_tokens=raw or not tokenizer.chat_template,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming(out):
        out.write_text(render_report(inspection), encoding="utf-8")
    by_head = inspection.entries(next(iter(inspection.kept)))
    least, most = int(by_head.min()), int(by_head.max())
    mebibytes = [f"{size / 2**20:.2f} MiB" for size in (inspection.kept_bytes, inspection.full_bytes)]
    report(
        f"{out}: {inspection.budget} of {len(inspection.pieces)} tokens per head on average (from {least:,} to "
        f"{most:,}), {' of '.join(mebibytes)}",
        {
            "report": str(out),
            "tokens": len(inspection.pieces),
            "budget": inspection.budget,
            "allocation": allocation,
            "entries": {name: inspection.entries(name).tolist() for name in inspection.kept},
            "bytes": inspection.kept_bytes,
            "bytes_without_eviction": inspection.full_bytes,
            "answers": inspection.answers,
        },
    )
