"""``lkq-hf evaluate``: what evicted caches lose on tasks made from the user's texts, and perplexity."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from lkq_hf.cli.checks import (
    ALLOCATIONS,
    SCORERS,
    TASKS,
    budgets_of,
    check_adapter_directory,
    check_choice,
    check_dtype,
    check_model_directory,
    check_writable,
    names_of,
    whole_numbers,
)
from lkq_hf.cli.options import Allocation, Device, Model, check_adapter, find_device, load_model, model_note
from lkq_hf.cli.output import AsJson, report

app = typer.Typer(
    help="Measure what is lost, on texts of your own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Text = Annotated[
    list[Path],
    typer.Option(
        help="Texts: plain files, or jsonl(.gz) with a 'text' each; repeatable.", exists=True, dir_okay=False
    ),
]
Out = Annotated[Path, typer.Option(help="Directory for the results; a stopped run in it goes on.", file_okay=False)]
Precision = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16 or float16; auto: bfloat16 on a GPU, else float32.")
]
BatchSize = Annotated[int, typer.Option(help="Prompts or windows in a batch.", min=1)]


@app.command()
def eviction(
    model: Model,
    text: Text,
    out: Out,
    adapter: Annotated[str | None, typer.Option(help="Lookahead adapter: a directory or an id on the Hub.")] = None,
    budgets: Annotated[
        str, typer.Option(help="Entries to keep per KV head, as in 64,128,256, or fractions of the prompt, as in 0.1.")
    ] = "64,128,256",
    scorers: Annotated[
        str | None,
        typer.Option(help=f"Of {', '.join(SCORERS)}. Default: all but random, and lookahead if there is an adapter."),
    ] = None,
    allocation: Allocation = "global",
    tasks: Annotated[
        str,
        typer.Option(help=f"Of {', '.join(TASKS)}."),
    ] = "needle,needle_multi_key,needle_multi_value,variable_tracking,frequent_words,summarise",
    questions: Annotated[
        Path | None,
        typer.Option(
            help="For question_answering: jsonl with 'question', 'context' and 'answers'.", exists=True, dir_okay=False
        ),
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of the prompts, as in 1024,2048.")] = "2048",
    examples: Annotated[int, typer.Option(help="Prompts of each task and length.", min=1)] = 20,
    batch_size: BatchSize = 4,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    plots: Annotated[bool, typer.Option(help="Draw quality against budget and bytes (needs matplotlib).")] = True,
    as_json: AsJson = False,
    dtype: Precision = "auto",
    device: Device = None,
) -> None:
    """Compare evicted caches with the full one.

    Prompts are made from your texts. Every prompt is read once; from that, each scorer's cache at each budget is
    made, and answers. Writes results.json, results.md and four plots. Under `accelerate launch`, the prompts are
    divided among the processes.
    """
    default = "lookahead,snapkv,streaming,oracle" if adapter else "snapkv,streaming,oracle"
    chosen = names_of("--scorers", default if scorers is None else scorers)
    for name in chosen:
        check_choice("--scorers", name, SCORERS)
    if "lookahead" in chosen and adapter is None:
        raise ValueError("the lookahead scorer needs an adapter: pass --adapter, or leave lookahead out of --scorers")
    kinds = names_of("--tasks", tasks)
    for name in kinds:
        check_choice("--tasks", name, TASKS)
    if ("question_answering" in kinds) != (questions is not None):
        raise ValueError("--questions FILE and the task question_answering go together: pass both or neither")
    wanted, lengths = budgets_of("--budgets", budgets), whole_numbers("--length", length)
    check_choice("--allocation", allocation, ALLOCATIONS)
    check_dtype(dtype, "auto")
    check_model_directory(model)
    if adapter is not None:
        check_adapter_directory(adapter)
    check_writable(out)

    from lkq_hf.evaluation.eviction import check_budgets, check_lengths, evaluate_eviction, load_evaluator
    from lkq_hf.evaluation.journal import Journal
    from lkq_hf.evaluation.plots import require_matplotlib, save_plots
    from lkq_hf.evaluation.tables import eviction_table
    from lkq_hf.evaluation.tasks import Corpus, QuestionAnswering, build_task
    from lkq_hf.text.documents import read_documents

    if plots:
        require_matplotlib()
    if adapter is not None:
        check_adapter(adapter)
    kept = check_budgets(wanted)
    documents = read_documents(text)
    causal_lm, tokenizer, dtype = _load(model, dtype, device)
    corpus = Corpus(documents, tokenizer)
    built = [
        QuestionAnswering.from_jsonl(corpus, questions, seed)
        if questions and kind == QuestionAnswering.kind
        else build_task(kind, corpus, seed)
        for kind in kinds
    ]
    check_lengths(kept, lengths, built, causal_lm)
    if examples * max(lengths) > corpus.tokens:
        typer.echo(
            f"{examples} prompts of {max(lengths):,} tokens are drawn from {corpus.tokens:,} tokens of text: they "
            "overlap, and count for fewer",
            err=True,
        )
    journal = Journal(
        out,
        {
            "command": "evaluate eviction",
            "adapter": adapter,
            "budgets": kept,
            "scorers": chosen,
            "allocation": allocation,
            "tasks": kinds,
            "length": lengths,
            "examples": examples,
            "batch_size": batch_size,
            "seed": seed,
            **model_note(model, causal_lm, dtype, *text, questions, adapter),
        },
    )
    evaluator = load_evaluator(causal_lm, tokenizer, adapter, chosen, kept, allocation)
    results = evaluate_eviction(evaluator, built, lengths, examples, journal, batch_size)
    table = eviction_table(results["rows"])
    if _write(out, results, table) and plots:
        for path in save_plots(results["rows"], out):
            typer.echo(f"Wrote {path}", err=True)


@app.command()
def perplexity(
    model: Model,
    text: Text,
    out: Out,
    reference: Annotated[
        str | None,
        typer.Option(help="Model to compare with, such as the base of a quantized one: a directory or an id."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="At most so many windows, from the start.")] = None,
    batch_size: BatchSize = 1,
    as_json: AsJson = False,
    dtype: Precision = "auto",
    device: Device = None,
) -> None:
    """Measure perplexity on your texts.

    They are cut into windows that do not overlap. With --reference, the KL divergence from that model is measured too
    (mean and 99th percentile over tokens), and for what share of tokens both have the same top token.

    Under `accelerate launch`, the windows are divided among the processes.
    """
    check_dtype(dtype, "auto")
    check_model_directory(model)
    if reference is not None:
        check_model_directory(reference)
    check_writable(out)

    from lkq_hf.evaluation.journal import Journal
    from lkq_hf.evaluation.perplexity import check_window, evaluate_perplexity, text_windows
    from lkq_hf.evaluation.tables import perplexity_table
    from lkq_hf.text.documents import count_copies, read_documents

    documents = read_documents(text)
    if copies := count_copies(documents):
        typer.echo(f"{copies} of {len(documents)} texts are copies of others, and are measured again", err=True)
    causal_lm, tokenizer, dtype = _load(model, dtype, device)
    check_window(causal_lm, window)
    original, original_note = None, {}
    if reference is not None:
        original, other_tokenizer, _ = _load(reference, dtype, device)
        if other_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizers of {model} and {reference} differ: expected a reference with the same vocabulary, "
                "such as the base model of a quantized one"
            )
        original_note = {"reference": model_note(reference, original, dtype)}
    windows = text_windows(documents, tokenizer, window, max_windows)
    journal = Journal(
        out,
        {
            "command": "evaluate perplexity",
            "window": window,
            "max_windows": max_windows,
            "batch_size": batch_size,
            # Of the same texts, other versions may make other windows.
            "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            **model_note(model, causal_lm, dtype, *text),
            **original_note,
        },
    )
    results = evaluate_perplexity(causal_lm, windows, journal, batch_size, original)
    _write(out, results, perplexity_table(results["rows"]))


def _load(model: str, dtype: str, device: str | None) -> tuple[Any, Any, str]:
    """The model on this process's device, its tokenizer, and the data type that was chosen."""
    _, place = find_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if place.startswith("cuda") else "float32"
    return *load_model(model, dtype, place), dtype


def _write(out: Path, results: dict[str, Any], table: str) -> bool:
    """Writes and prints the results, in one process only; returns whether this is the one."""
    from accelerate import PartialState

    from lkq_hf.files import write_json, write_text

    if not PartialState().is_main_process:
        return False
    write_json(out / "results.json", results)
    write_text(out / "results.md", table + "\n")
    report(table, {name: value for name, value in results.items() if name != "records"})
    typer.echo(f"Wrote {out / 'results.json'}", err=True)
    return True
