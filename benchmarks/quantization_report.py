"""Tables and a picture of what quantization.py measured.

    python benchmarks/quantization_report.py benchmarks/results/quantization_smollm2*.json \
        --out benchmarks/results/quantization_smollm2.md --plot docs/images/quantization.png

All files must have measured the same model on the same windows of text.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from quantization import METHODS, UNCORRECTED

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS = "default"
PEER = "GPTQModel"
# What the picture shows, from the worst to the best.
PLOTTED = ("GPTQ", "GPTQ + MSE-searched scales", "stage 1 only", "stage 2 only", "both stages", PEER, OURS)

Runs = list[dict[str, Any]]


def increase(runs: Iterable[dict[str, Any]], text: str) -> list[float]:
    """Per window of a text the mean over runs (calibration seeds), in nats."""
    return [statistics.fmean(values) for values in zip(*(run["increase"][text] for run in runs), strict=True)]


def mean_and_error(runs: Runs) -> tuple[float, float]:
    """Mean over texts and seeds, and its standard error over windows, which are taken as independent."""
    texts = [increase(runs, text) for text in runs[0]["increase"]]
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in texts)) / len(texts)
    return statistics.fmean(map(statistics.fmean, texts)), error


def select(runs: Runs, method: str, bits: int, sym: bool) -> Runs:
    chosen = [run for run in runs if run["bits"] == bits and run["sym"] == sym]
    if method == PEER:
        return [run for run in chosen if run["method"].startswith(PEER)]
    return [run for run in chosen if run["method"] == method]


def methods_table(runs: Runs, sym: bool) -> list[str]:
    chosen = [run for run in runs if run["sym"] == sym]
    widths = sorted({run["bits"] for run in chosen}, reverse=True)
    seeds = {run["seed"] for run in chosen}
    lines = ["| method | " + " | ".join(f"{bits} bits" for bits in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    known = list(METHODS)
    methods = dict.fromkeys(run["method"] for run in chosen)
    for method in sorted(methods, key=lambda name: known.index(name) if name in known else len(known)):
        texts = []
        for bits in widths:
            same = select(chosen, method, bits, sym)
            if not same:
                texts.append("")
                continue
            mean, error = mean_and_error(same)
            missing = "" if {run["seed"] for run in same} == seeds else f" ({len(same)} of {len(seeds)} seeds)"
            texts.append(f"{mean:.3f} ± {error:.3f}{missing}")
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return lines


def changes_table(runs: Runs, base: str) -> list[str]:
    """What `base` loses more with one thing changed, window by window: less noise than the two losses have."""
    widths = sorted({run["bits"] for run in runs}, reverse=True)
    header = f"| {base}, but | " + " | ".join(f"{bits} bits" for bits in widths) + " |"
    lines = [header, "|---" * (len(widths) + 1) + "|"]
    changed = [name for name in METHODS if name.startswith(f"{base}, ")]
    if base == OURS:
        changed.insert(0, UNCORRECTED)
    for method in changed:
        texts = []
        for bits in widths:
            pairs = {run["seed"]: [run] for run in select(runs, base, bits, sym=False)}
            for run in select(runs, method, bits, sym=False):
                pairs.setdefault(run["seed"], []).append(run)
            pairs = {seed: pair for seed, pair in pairs.items() if len(pair) == 2}
            if not pairs:
                texts.append("")
                continue
            mean, error = mean_and_error([difference(*pair) for pair in pairs.values()])
            seeds = "" if len(pairs) > 1 else f" (seed {next(iter(pairs))})"
            texts.append(f"{mean:+.3f} ± {error:.3f}{seeds}")
        if any(texts):
            lines.append(f"| {method.removeprefix(f'{base}, ')} | " + " | ".join(texts) + " |")
    return lines if len(lines) > 2 else []


def difference(base: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """A run whose values are those of `changed` less those of `base`."""
    values = {
        text: [after - before for before, after in zip(losses, changed["increase"][text], strict=True)]
        for text, losses in base["increase"].items()
    }
    return {"increase": values}


def peer_table(runs: Runs) -> list[str]:
    """The default against GPTQModel: each text, bit width and seed of which both were measured."""
    lines = ["| text | bits | seed | GPTQModel | default | fewer nats |", "|---|---|---|---|---|---|"]
    for peer in sorted(
        (run for run in runs if run["method"].startswith(PEER)), key=lambda run: (-run["bits"], run["seed"])
    ):
        own = [run for run in select(runs, OURS, peer["bits"], peer["sym"]) if run["seed"] == peer["seed"]]
        if not own:
            continue
        if own[0]["calibration"] != peer["calibration"]:
            raise SystemExit(f"the calibration tokens of {peer['method']} and the default differ; measure them again")
        for text in peer["increase"]:
            theirs, ours = (statistics.fmean(run["increase"][text]) for run in (peer, own[0]))
            lines.append(
                f"| {text} | {peer['bits']} | {peer['seed']} | {theirs:.3f} | {ours:.3f} | {1 - ours / theirs:.0%} |"
            )
    return lines if len(lines) > 2 else []


def plot(runs: Runs, path: Path, title: str) -> None:
    widths = sorted({run["bits"] for run in runs}, reverse=True)
    figure, axes = plt.subplots(1, len(widths), figsize=(9, 3.2), layout="constrained")
    for axis, bits in zip(axes, widths, strict=True):
        shown = [(method, select(runs, method, bits, sym=False)) for method in PLOTTED]
        shown = [(method, chosen) for method, chosen in shown if chosen]
        values = [mean_and_error(chosen) for _, chosen in shown]
        colors = ["#d95f02" if method == OURS else "#7570b3" if method == PEER else "#9aa5b1" for method, _ in shown]
        axis.barh(range(len(shown)), [mean for mean, _ in values], xerr=[e for _, e in values], color=colors)
        axis.set_yticks(range(len(shown)), [method for method, _ in shown] if axis is axes[0] else [])
        axis.invert_yaxis()
        axis.set_title(f"{bits} bits", fontsize=10)
        axis.set_xlabel("nats lost", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.25)
        for row, (mean, error) in enumerate(values):
            axis.annotate(
                f"{mean:.2f}", (mean + error, row), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def hardware(runs: Runs) -> str:
    places = {}
    for run in runs:
        about = run["environment"]
        versions = about["versions"]
        place = about.get("gpu") or f"CPU ({about['cpu']}, threads: {about['threads']})"
        places[f"{place}, torch {versions['torch']}, transformers {versions['transformers']}"] = None
    return "; ".join(places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="markdown file")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="its name, for the titles")
    parser.add_argument("--plot", type=Path, help="PNG file")
    arguments = parser.parse_args()

    files = [json.loads(path.read_text()) for path in arguments.results]
    settings = files[0]["settings"]
    for path, file in zip(arguments.results, files, strict=True):
        if file["settings"] != settings:
            raise SystemExit(f"{path} measured with {file['settings']}, {arguments.results[0]} with {settings}")
    # A run that two files hold is taken from the first.
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in (run for file in files for run in file["runs"]):
        found.setdefault((run["method"], run["bits"], run["sym"], run["seed"]), run)
    runs = list(found.values())

    first = next(iter(runs[0]["increase"].values()))
    calibration = f"{settings['samples']} x {settings['length']} tokens"
    lines = [
        f"{arguments.model}, groups of {settings['group_size']}, calibrated on {calibration} of the Python "
        f"documentation; {len(first)} windows of 1,024 tokens from each text. "
        "Increase of the negative log-likelihood over full precision, in nats per token: mean over texts and "
        "calibration seeds ± standard error over windows. Full precision: "
        + ", ".join(f"{text} {statistics.fmean(losses):.3f}" for text, losses in files[0]["full_precision"].items())
        + f". {hardware(runs)}."
    ]
    peer = peer_table(runs)
    if peer:
        lines += ["", "## The default against GPTQModel's strongest settings", "", *peer]
    for sym in sorted({run["sym"] for run in runs}):
        lines += ["", f"## {'Symmetric' if sym else 'Asymmetric'}", "", *methods_table(runs, sym)]
    tables = [table for base in (OURS, UNCORRECTED) if (table := changes_table(runs, base))]
    if tables:
        lines += ["", "## One thing changed", ""]
        lines += ["Asymmetric. Nats lost more than without the change, over the same windows: less is better."]
        lines += [line for table in tables for line in ("", *table)]
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if arguments.plot is not None:
        plot(runs, arguments.plot, f"{arguments.model}, groups of {settings['group_size']}, asymmetric")


if __name__ == "__main__":
    main()
