"""Draws the pictures of the pages, docs/images, from recorded results: python benchmarks/pictures.py"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import DEFAULT, NOW, OURS, PEER, SMOLLM2, Runs, mean_and_error, runs_of, select
from tables import load

from lkq_hf.evaluation.plots import FULL_STYLE, STYLES, finish, new_figure

IMAGES = Path(__file__).parents[1] / "docs" / "images"
METHODS = {"oracle": "oracle (knows the answer)", "lookahead": "LookaheadCache", "snapkv": "SnapKV"}
METHODS["streaming"] = "sinks + recent"
LABELS = {"lookahead": OURS, "streaming": "sinks + recent", "oracle": "oracle"}


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
    finish(figure, fontsize=9)
    return figure


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


def draw_quantization(runs: Runs) -> Any:
    """Bars of the nats lost by each method, a panel for each width."""
    widths = sorted({run["bits"] for run in runs}, reverse=True)
    methods = ("GPTQ", "GPTQ + MSE-searched scales", "stage 1 only", "stage 2 only", "both stages", PEER, DEFAULT)
    figure = new_figure(9, 3.2)
    for axis, bits in zip(figure.subplots(1, len(widths)), widths, strict=True):
        shown = [(method, mean_and_error(chosen)) for method in methods if (chosen := select(runs, method, bits))]
        colors = [{DEFAULT: "#d95f02", PEER: "#7570b3"}.get(method, "#9aa5b1") for method, _ in shown]
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
    return figure


def draw(directory: Path = IMAGES) -> None:
    """Draws the pictures of the pages."""
    draw_eviction(load(NOW[0]), 2048).savefig(directory / "eviction_quality.png", dpi=150)
    draw_products(load("quantized_matmul")["results"]).savefig(directory / "speed.png", dpi=110)
    draw_quantization(runs_of(*SMOLLM2)).savefig(directory / "quantization.png", dpi=100)


if __name__ == "__main__":
    draw()
