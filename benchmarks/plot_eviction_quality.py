"""Draws the README's picture: quality against budget, out of the results of eviction_quality.py.

    python benchmarks/plot_eviction_quality.py benchmarks/results/eviction_quality.json \
        --out docs/images/eviction_quality.png

Two panels: how much of the full cache's own answers each evicted cache predicts, and how many planted facts it finds.
SnapKV is given the pooling that is best for it at each budget; the lookahead scorer has the adapter's own.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lkq_hf.evaluation.plots import FULL_STYLE, STYLES, new_figure

METHODS = {
    "oracle": "oracle (knows the answer)",
    "lookahead": "LookaheadCache",
    "snapkv": "SnapKV",
    "streaming": "sinks + recent",
}
ROWS = {"lookahead": "lookahead, adapter's pooling", "streaming": "sinks + recent", "oracle": "oracle"}

Rows = Mapping[str, Mapping[str, float]]


def series(rows: Rows, method: str, metric: str) -> dict[int, float]:
    """A metric, higher being better, by budget."""
    found: dict[int, float] = {}
    for name, row in rows.items():
        budget, _, label = name.partition("/")
        if label == ROWS.get(method) or (method == "snapkv" and label.startswith("snapkv")):
            found[int(budget)] = max(row[metric], found.get(int(budget), row[metric]))
    return found


def draw(results: Mapping[str, Any], length: int) -> Any:
    """The figure, for prompts of one length."""
    measured = results["measurements"]
    likelihood, facts = measured[f"likelihood, {length} tokens"], measured[f"needle, {length} tokens"]
    panels = [
        (f"Tokens of the full cache's answers, predicted\n{likelihood['prompts']} prompts", likelihood, "matched"),
        (f"Planted facts, found\n{facts['prompts']} prompts", facts, "accuracy"),
    ]
    figure = new_figure(8.6, 3.5)
    for panel, (title, measurement, metric) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = measurement["rows"]
        full = rows["full"][metric]
        panel.axhline(full, label=f"full cache ({length:,} entries)", **FULL_STYLE)
        for method, label in METHODS.items():
            points = series(rows, method, metric)
            color, marker = STYLES[method]
            mine = method == "lookahead"
            panel.plot(
                points.keys(),
                points.values(),
                label=label,
                color=color,
                marker=marker,
                linewidth=2.4 if mine else 1.4,
                zorder=4 if mine else 3,
            )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file of eviction_quality.py")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompts")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    arguments = parser.parse_args()
    figure = draw(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.length)
    figure.savefig(arguments.out, dpi=150)


if __name__ == "__main__":
    main()
