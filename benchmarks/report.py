"""Writes the tables (results/*.md) and the pictures (docs/images) of what results/*.json holds.

    python benchmarks/report.py                 # all of them
    python benchmarks/report.py speed           # some, by name

Numbers of the pages themselves are written by pages.py.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tables import RESULTS, columns, load, machine, table

from lkq_hf.evaluation.plots import FULL_STYLE, STYLES, new_figure

IMAGES = Path(__file__).parents[1] / "docs" / "images"
Runs = list[dict[str, Any]]


def write(name: str, *parts: str) -> None:
    """A page beside its results."""
    (RESULTS / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# Evicted caches

QUALITY = (
    "budget={budget} | method={method} | NLL of the full cache's answer={nll:.3f} | "
    "tokens matched={matched:.3f} | recall of the oracle's top-k={recall:.3f} | "
    "gap closed from the best SnapKV to the full cache={closes_gap:.3f} | "
    "right answers={accuracy:.3f} | share of the full cache's right answers={kept:.3f} | "
    "word F1 against the full cache's answer={word_f1:.3f}"
)


def eviction_quality(name: str = "eviction_quality") -> None:
    results = load(name)
    about = results["about"]
    parts = [
        "# Quality of answers over an evicted cache",
        f"{about['model']}, adapter: {about['adapter']}. {machine(about)}; {about['dtype']}. Allocation of "
        f"the budget, of all scorers: {about['allocation']}. {results['seconds']:.0f} s.",
    ]
    for title, measured in results["measurements"].items():
        rows = [
            {
                "budget": key.partition("/")[0] if "/" in key else "none",
                "method": key.partition("/")[2] or "full cache",
            }
            | row
            for key, row in measured["rows"].items()
        ]
        parts += [f"## {title} ({measured['prompts']} prompts)", columns(rows, QUALITY)]
    write(name, *parts)


def conversations(file: str = "conversations") -> None:
    results = load(file)
    parts = [
        "# Conversations of several turns over one text"
        + (", read before the first question" if results.get("read_first") else ""),
        f"{machine(results['about'])}; {results['seconds']:.0f} s.",
    ]
    for length, caches in results["lengths"].items():
        full = caches["full cache"]["right"]
        rows = []
        for name, cache in caches.items():
            share = [value / whole if whole else 0.0 for value, whole in zip(cache["right"], full, strict=True)]
            shown = full if name == "full cache" else share
            sizes = (f"{cache['bytes'][turn]:,}" for turn in (0, -1))
            rows.append([name, *(f"{value:.2f}" for value in shown), *sizes])
        turns = [f"turn {turn}" for turn in range(1, len(full) + 1)]
        parts += [
            f"## {length} tokens, {results['conversations']} conversations",
            "Right answers of the full cache; of the others the share of the full cache's.",
            table(["cache", *turns, "bytes, turn 1", f"bytes, {turns[-1]}"], rows),
        ]
    write(file, *parts)


def chunked_prefill() -> None:
    results = load("chunked_prefill")
    length = f"{results['length']:,}"
    write(
        "chunked_prefill",
        "# Chunked prefill",
        f"One planted fact in {length} tokens: how many of {results['prompts']} are found. SmolLM2-135M-Instruct; "
        f"{machine(results['about'])}. With a budget of {length} all is kept: {results['full cache']} are found.",
        table(
            ["prompt read", *(f"budget {budget}" for budget in results["budgets"])],
            [[name, *map(str, found.values())] for name, found in results["found"].items()],
        ),
    )


def eviction_picture() -> None:
    draw_eviction(load("eviction_quality"), 2048).savefig(IMAGES / "eviction_quality.png", dpi=150)


METHODS = {"oracle": "oracle (knows the answer)", "lookahead": "LookaheadCache", "snapkv": "SnapKV"}
METHODS["streaming"] = "sinks + recent"
LABELS = {"lookahead": "lookahead, adapter's pooling", "streaming": "sinks + recent", "oracle": "oracle"}


def series(rows: Mapping[str, Mapping[str, float]], method: str, metric: str) -> dict[int, float]:
    """A metric, higher being better, by budget. SnapKV has the pooling that is best for it at each budget."""
    found: dict[int, float] = {}
    for name, row in rows.items():
        budget, _, label = name.partition("/")
        if label == LABELS.get(method) or (method == "snapkv" and label.startswith("snapkv")):
            found[int(budget)] = max(row[metric], found.get(int(budget), row[metric]))
    return found


def draw_eviction(results: Mapping[str, Any], length: int) -> Any:
    """The README's picture, for prompts of one length: answers predicted, and planted facts found."""
    measured = results["measurements"]
    likelihood, facts = measured[f"likelihood, {length} tokens"], measured[f"needle, {length} tokens"]
    panels = [
        (f"Tokens of the full cache's answers, predicted\n{likelihood['prompts']} prompts", likelihood, "matched"),
        (f"Planted facts, found\n{facts['prompts']} prompts", facts, "accuracy"),
    ]
    figure = new_figure(8.6, 3.5)
    for panel, (title, measurement, metric) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = measurement["rows"]
        panel.axhline(rows["full"][metric], label=f"full cache ({length:,} entries)", **FULL_STYLE)
        for method, label in METHODS.items():
            points = series(rows, method, metric)
            (color, marker), mine = STYLES[method], method == "lookahead"
            style = {"linewidth": 2.4, "zorder": 4} if mine else {"linewidth": 1.4, "zorder": 3}
            panel.plot(points.keys(), points.values(), label=label, color=color, marker=marker, **style)
        budgets = list(points)
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [f"{budget}\n{budget / length:.1%}" for budget in budgets])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("entries kept per KV head, and share of the prompt", fontsize=9)
        panel.grid(color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


# Training


def adapter_ablation() -> None:
    results = load("adapter_ablation")
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results["settings"].items())
    snapkv = ", ".join(f"{nll:.3f} at {budget}" for budget, nll in results["nll"]["best SnapKV"].items())
    rows = [
        {"variant": name}
        | row
        | {f"{way} {n}": gap for way, gaps in row["gap_closed"].items() for n, gap in gaps.items()}
        for name, row in results["variants"].items()
    ]
    poolings = next(iter(results["variants"].values()))["gap_closed"]
    sizes = list(results["nll"]["best SnapKV"])
    cells = "variant={variant} | parameters={parameters:,}"
    cells += "".join(f" | gap closed at {n}, {way}={{{way} {n}:.3f}}" for way in poolings for n in sizes)
    cells += "".join(f" | recall@{n}={{recall@{n}:.3f}}" for n in sizes) + " | KL={kl:.4f} | seconds={seconds:.0f}"
    write(
        "adapter_ablation",
        "# What each part of a lookahead adapter brings",
        f"Short trainings that differ from the first in one thing: {settings}. NLL of the responses: {snapkv} with "
        f"the better of two SnapKVs, {results['nll']['full cache']:.3f} with the full cache. "
        f"{machine(results['environment'])}.",
        columns(rows, cells),
    )


# Speed


def speed() -> None:
    parts = ["# Speed", "Written by `python benchmarks/report.py speed` from the JSON files beside it; do not edit."]
    earlier = "Rows with * are from an earlier run on the same kind of machine."

    def section(name: str, title: str, about: str, *rest: str) -> None:
        parts.extend([f"## {title}", f"{about}. Script: `benchmarks/{name}.py`.", *rest])

    def marked(rows: Iterable[dict[str, Any]]) -> Runs:
        return [row | {"mark": " *" if row.get("earlier") else ""} for row in rows]

    for name in ("decode_speed", "decode_ragged"):
        found = load(name)
        sizes = found["sizes"]
        section(
            "decode_speed",
            f"Decoding after a prompt of {sizes['prompt']:,} tokens, {sizes['budget']:,} entries kept",
            f"8B Llama, random weights, through `generate`; {machine(found['hardware'])}",
            columns(
                [
                    row | {"error": row["error"].split(":")[0]} if "error" in row else row
                    for row in marked(found["cells"])
                ],
                "weights={weights} | batch={batch} | cache={cache}{mark} | tokens/s={tokens_per_second:.1f} | "
                "ms a step={ms_per_step:.2f} | "
                "10 to 90 %={ms_per_step_p10_p90[0]:.1f} to {ms_per_step_p10_p90[1]:.1f} | "
                "cache, GiB={cache_gib:.2f} | peak, GiB={peak_gib:.1f} | failed={error}",
            ),
            earlier,
        )
    found = load("eviction_overhead")
    section(
        "eviction_overhead",
        "Eviction",
        f"Random weights, budget 128, 32 lookahead tokens; {machine(found['hardware'])}",
        "One layer of Llama-3.1-8B, microseconds on the GPU. The last column counts one read of the keys.",
        columns(
            found["kernels"],
            "prompt={length:,} | scores={scoring_us:.0f} | selection={selection_us:.0f} | "
            "both in plain torch={plain_torch_us:.0f} | one read of the keys={one_read_of_keys_us:.1f} | "
            "of copy bandwidth={scoring_share_of_copy_bandwidth_counting_one_read:.0%}",
        ),
        'Whole prefills. "full + 32" reads a prompt longer by the 32 lookahead tokens, without eviction. "saved" '
        "is of the full KV cache's size. Differences below about 1 % are noise; some are negative.",
        columns(
            marked(found["prefill"]),
            "model={model} | batch={batch} | prompt={length:,} | method={method}{mark} | runs={runs} | "
            "ms={ms:.1f} | over full, ms={overhead_ms:.1f} | %={overhead_percent:.2f} | "
            "peak, GiB={peak_gib:.2f} | saved, %={peak_saved_of_full_kv_percent:.1f}",
        ),
        earlier,
    )
    found = load("quantized_matmul")
    first = found["results"][0]
    peers = sorted({key for row in found["results"] for key in row if key.endswith("_us") and key != "cublas_us"})
    section(
        "quantized_matmul",
        "Low-bit matrix products",
        f"Shapes of Llama-3.1-8B, groups of {first['group_size']}, {'symmetric' if first['sym'] else 'asymmetric'}, "
        f"{first['dtype']}; {machine(found['hardware'])}",
        "Microseconds in a CUDA graph of one product after the other, weights from memory; the fastest kernel "
        "and tile were found with a small kernel between the products, as in models. Copy bandwidth: "
        f"{found['hardware']['copy_bandwidth_tb_s']:.2f} TB/s.",
        columns(
            marked(found["results"]),
            "weights=W{bits}{mark} | out x in={out_features} x {in_features} | rows={rows} | us={us:.1f} | "
            "bf16 cuBLAS, us={cublas_us:.1f} | times bf16={speedup:.2f} | "
            "of copy={share_of_copy_bandwidth:.0%}"
            + "".join(f" | {peer.removesuffix('_us')}, us={{{peer}:.1f}}" for peer in peers),
        ),
        earlier,
    )
    found = load("quantization_speed")
    sizes, steps = found["settings"], list(found["model_seconds"])
    rows = [[name, *(f"{1e3 * took[step]:.0f}" for step in steps)] for name, took in found["layers_seconds"].items()]
    rows.append(["whole model, s", *(f"{found['model_seconds'][step]:.1f}" for step in steps)])
    summary = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["summary_seconds"].items())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    section(
        "quantization_speed",
        "Quantizing Llama-3.1-8B: arithmetic",
        f"{sizes['bits']} bits, groups of {sizes['group_size']}, {sizes['tokens']:,} calibration tokens, "
        f"{sizes['sweeps']} sweeps; {found['hardware']}, {versions}",
        f"Milliseconds per layer, without forward passes and loading. Whole model: {summary}.",
        table(["layer", *steps], rows),
    )
    write("speed", *parts)
    draw_products(load("quantized_matmul")["results"]).savefig(IMAGES / "speed.png", dpi=110)


def draw_products(rows: Runs) -> Any:
    """Times bf16's speed by activation rows, for the two largest shapes."""
    figure = new_figure(8.6, 3.5)
    shapes = [(14336, 4096), (4096, 14336)]
    for panel, shape in zip(figure.subplots(1, 2, sharey=True), shapes, strict=True):
        for bits, marker in ((4, "o"), (3, "s"), (2, "^")):
            chosen = [r for r in rows if r["bits"] == bits and (r["out_features"], r["in_features"]) == shape]
            panel.plot([r["rows"] for r in chosen], [r["speedup"] for r in chosen], marker=marker, label=f"W{bits}")
        panel.axhline(1, color="0.5", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_title(f"{shape[0]} x {shape[1]}")
        panel.set_xlabel("activation rows")
    figure.axes[0].set_ylabel("times the speed of bf16 cuBLAS")
    figure.axes[0].legend(frameon=False)
    return figure


def ragged_attention() -> None:
    results = load("ragged_attention")
    write(
        "ragged_attention",
        "# Attention over ragged segments",
        f"{machine(results['hardware'])}; copy bandwidth {results['hardware']['copy_bandwidth_tb_s']} TB/s. "
        "`python benchmarks/ragged_attention.py`",
        "Microseconds of one call in a CUDA graph: one token, Llama-3.1-8B's heads, bfloat16. Dense attention "
        "reads the same number of entries for each head, a copy moves the bytes that the ragged "
        "kernel reads. Shares are of the copy bandwidth.",
        columns(
            results["decode"],
            "batch={batch} | mean entries={mean} | ragged={ragged_us:.1f} | uniform={uniform_us:.1f}"
            " | dense={dense_us:.1f} | copy={copy_us:.1f} | ragged, share={ragged_share_of_copy_bandwidth:.0%}"
            " | no graph={ragged_without_graph_us:.1f}",
        ),
        "Several new tokens, mean entries as above plus the tokens themselves: the kernel, and "
        "`scaled_dot_product_attention` without a mask over dense tensors of the same mean.",
        columns(
            results["queries"],
            "tokens={q} | batch={batch} | mean entries={mean} | kernel={kernel_us:.1f} | dense={dense_us:.1f}",
        ),
    )


# Quantization

OURS, PEER, UNCORRECTED = "default", "GPTQModel", "residual not corrected"
PLOTTED = ("GPTQ", "GPTQ + MSE-searched scales", "stage 1 only", "stage 2 only", "both stages", PEER, OURS)


def mean_and_error(runs: Runs) -> tuple[float, float]:
    """Nats lost: the mean over texts and seeds, and its standard error over windows, taken as independent."""
    texts = [
        [statistics.fmean(values) for values in zip(*(run["increase"][text] for run in runs), strict=True)]
        for text in runs[0]["increase"]
    ]
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in texts)) / len(texts)
    return statistics.fmean(map(statistics.fmean, texts)), error


def select(runs: Runs, method: str, bits: int, sym: bool = False) -> Runs:
    chosen = [run for run in runs if run["bits"] == bits and run["sym"] == sym]
    return [run for run in chosen if run["method"] == method or (method == PEER and run["method"].startswith(PEER))]


def by_width(runs: Runs, title: str, names: Iterable[str], cell: Callable[[str, int], str]) -> str:
    """A table of methods by bits; a method without any value has no row."""
    widths = sorted({run["bits"] for run in runs}, reverse=True)
    rows = [[name, *(cell(name, bits) for bits in widths)] for name in names]
    return table([title, *(f"{bits} bits" for bits in widths)], [row for row in rows if any(row[1:])])


def methods_table(runs: Runs, sym: bool) -> str:
    chosen = [run for run in runs if run["sym"] == sym]
    seeds = {run["seed"] for run in chosen}

    def cell(method: str, bits: int) -> str:
        same = [run for run in chosen if run["method"] == method and run["bits"] == bits]
        if not same:
            return ""
        missing = "" if {run["seed"] for run in same} == seeds else f" ({len(same)} of {len(seeds)} seeds)"
        return "{:.3f} ± {:.3f}".format(*mean_and_error(same)) + missing

    names = sorted(dict.fromkeys(run["method"] for run in chosen), key=lambda name: not name.startswith(OURS))
    return by_width(chosen, "method", names, cell)


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    values = {name: zip(old["increase"][name], losses, strict=True) for name, losses in new["increase"].items()}
    return {"increase": {name: [after - before for before, after in pairs] for name, pairs in values.items()}}


def changes_table(runs: Runs, base: str) -> str:
    """What ``base`` loses more with one thing changed, window by window: less noise than the two losses have."""

    def cell(method: str, bits: int) -> str:
        pairs = {run["seed"]: [run] for run in select(runs, base, bits)}
        for run in select(runs, method, bits):
            pairs.setdefault(run["seed"], []).append(run)
        differences = [difference(*pair) for pair in pairs.values() if len(pair) == 2]
        seed = f" (seed {min(pairs)})" if len(differences) == 1 else ""
        return "{:+.3f} ± {:.3f}".format(*mean_and_error(differences)) + seed if differences else ""

    names = [name for name in dict.fromkeys(run["method"] for run in runs) if name.startswith(f"{base}, ")]
    names = [UNCORRECTED, *names] if base == OURS else names
    return by_width(runs, f"{base}, but", names, cell).replace(f"\n| {base}, ", "\n| ")


def peer_table(runs: Runs) -> str:
    """The default against GPTQModel: each text, bit width and seed of which both were measured.

    Raises:
        ValueError: the two had other calibration tokens.
    """
    rows = []
    peers = [run for run in runs if run["method"].startswith(PEER)]
    for peer in sorted(peers, key=lambda run: (-run["bits"], run["seed"])):
        for own in (run for run in select(runs, OURS, peer["bits"], peer["sym"]) if run["seed"] == peer["seed"]):
            if own["calibration"] != peer["calibration"]:
                raise ValueError(f"the calibration tokens of {peer['method']} and the default differ: measure again")
            for text, lost in peer["increase"].items():
                theirs, ours = statistics.fmean(lost), statistics.fmean(own["increase"][text])
                numbers = (f"{theirs:.3f}", f"{ours:.3f}", f"{1 - ours / theirs:.0%}")
                rows.append([text, str(peer["bits"]), str(peer["seed"]), *numbers])
    return table(["text", "bits", "seed", "GPTQModel", "default", "fewer nats"], rows) if rows else ""


def quantization(out: str, model: str, *names: str) -> Runs:
    """Tables of one or several files, which must have measured the same; a run that two hold is taken from the first.

    Raises:
        ValueError: the files have other settings.
    """
    files = [load(name) for name in names]
    settings = files[0]["settings"]
    if any(file["settings"] != settings for file in files):
        raise ValueError(f"{', '.join(names)} were measured with different settings")
    unique: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in (run for file in files for run in file["runs"]):
        unique.setdefault((run["method"], run["bits"], run["sym"], run["seed"]), run)
    runs = list(unique.values())
    full = ", ".join(f"{text} {statistics.fmean(nll):.3f}" for text, nll in files[0]["full_precision"].items())
    windows = len(next(iter(runs[0]["increase"].values())))
    machines = "; ".join(dict.fromkeys(machine(run["environment"]) for run in runs))
    parts = [
        f"{model}, groups of {settings['group_size']}, calibrated on {settings['samples']} x {settings['length']} "
        f"tokens of the Python documentation; {windows} windows of 1,024 tokens from each text. "
        "Increase of the negative log-likelihood over full precision, in nats per token: mean over texts and "
        f"calibration seeds ± standard error over windows. Full precision: {full}. {machines}."
    ]
    if peers := peer_table(runs):
        parts += ["## The default against GPTQModel's strongest settings", peers]
    for sym in sorted({run["sym"] for run in runs}):
        parts += [f"## {'Symmetric' if sym else 'Asymmetric'}", methods_table(runs, sym)]
    changed = [found for base in (OURS, UNCORRECTED) if (found := changes_table(runs, base)).count("\n") > 1]
    if changed:
        parts += [
            "## One thing changed",
            "Asymmetric. Nats lost more than without the change: less is better.",
            *changed,
        ]
    write(out, *parts)
    return runs


def quantization_smollm2() -> None:
    runs = quantization(
        "quantization_smollm2", "SmolLM2-135M-Instruct", "quantization_smollm2_gpu", "quantization_smollm2_gptqmodel"
    )
    widths = sorted({run["bits"] for run in runs}, reverse=True)
    figure = new_figure(9, 3.2)
    for axis, bits in zip(figure.subplots(1, len(widths)), widths, strict=True):
        shown = [(method, mean_and_error(chosen)) for method in PLOTTED if (chosen := select(runs, method, bits))]
        colors = [{OURS: "#d95f02", PEER: "#7570b3"}.get(method, "#9aa5b1") for method, _ in shown]
        means, errors = [mean for _, (mean, _) in shown], [error for _, (_, error) in shown]
        axis.barh(range(len(shown)), means, xerr=errors, color=colors)
        axis.set_yticks(range(len(shown)), [method for method, _ in shown] if axis is figure.axes[0] else [])
        axis.invert_yaxis()
        axis.set_title(f"{bits} bits", fontsize=10)
        axis.set_xlabel("nats lost", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.25)
        for row, (mean, error) in enumerate(zip(means, errors, strict=True)):
            place = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axis.annotate(f"{mean:.2f}", (mean + error, row), (4, 0), **place)
    figure.suptitle("SmolLM2-135M-Instruct, groups of 64, asymmetric", fontsize=10)
    figure.savefig(IMAGES / "quantization.png", dpi=100)


REPORTS: dict[str, Callable[[], object]] = {
    "eviction_quality": eviction_quality,
    "eviction_quality_round_3": lambda: eviction_quality("eviction_quality_round_3"),
    "eviction_quality_layer": lambda: eviction_quality("eviction_quality_layer"),
    "eviction_quality_uniform": lambda: eviction_quality("eviction_quality_uniform"),
    "eviction_picture": eviction_picture,
    "eviction_quality_gemma3": lambda: eviction_quality("eviction_quality_gemma3"),
    "conversations": conversations,
    "later_questions": lambda: conversations("later_questions"),
    "chunked_prefill": chunked_prefill,
    "adapter_ablation": adapter_ablation,
    "speed": speed,
    "ragged_attention": ragged_attention,
    "quantization_smollm2": quantization_smollm2,
    "quantization_gemma3": lambda: quantization("quantization_gemma3", "Gemma-3-270M", "quantization_gemma3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *REPORTS], metavar="NAME", help=", ".join(REPORTS))
    for name in parser.parse_args().names or REPORTS:
        REPORTS[name]()


if __name__ == "__main__":
    main()
