"""Pictures of an evaluation: quality against budget, and quality against bytes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lkq_hf.cache.allocation import MOST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which people with any color vision can tell apart; markers tell them apart in gray.
STYLES = {
    "lookahead": ("#0072B2", "o"),
    "snapkv": ("#E69F00", "s"),
    "streaming": ("#009E73", "^"),
    "random": ("#999999", "x"),
    "oracle": ("#CC79A7", "D"),
}
FULL_STYLE: dict[str, Any] = {"color": "0.25", "linestyle": (0, (4, 3)), "linewidth": 1.2}
TITLES = {
    "answer_match": "right answers",
    "token_agreement": "tokens of the full cache's answer",
    "word_f1": "word F1 to the full cache's answer",
    "nll_gap": "NLL gap to the full cache (nats)",
    "topk_recall": "recall of the oracle's entries",
    "retained_attention_mass": "the answer's attention kept",
}

Row = Mapping[str, Any]


def new_figure(width: float, height: float) -> "Figure":
    """A figure that belongs to no window, so that importing and drawing change nothing in a notebook.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def require_matplotlib() -> None:
    """Raises ImportError, with what to install, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed; run: pip install lkq-hf[plots]") from error


def quality_metric(rows: Sequence[Row]) -> str:
    """The metric by which a task is judged: right answers where it has any, else the full cache's tokens matched."""
    return "answer_match" if all("answer_match" in row for row in rows) else "token_agreement"


def plot_by_budget(rows: Sequence[Row], metric: str | None = None) -> "Figure":
    """A metric against the budget, a panel for each task and length.

    Args:
        rows: see `summarise`.
        metric: one of their columns; None for each task's `quality_metric`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups = _groups(rows)
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    figure = new_figure(max(5.2, 3.4 * columns), 2.7 * lines + 0.7)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel, ((task, length), group) in zip(axes.flat, groups.items(), strict=False):
        shown = metric or quality_metric(group)
        for scorer in dict.fromkeys(row["scorer"] for row in group):
            own = [row for row in group if row["scorer"] == scorer]
            if own[0]["budget"] is None:
                panel.axhline(own[0][shown], label=scorer, zorder=0, **FULL_STYLE)
                continue
            own = sorted(own, key=_entries)
            x, y = [_entries(row) for row in own], [row[shown] for row in own]
            panel.plot(x, y, label=scorer, **_style(scorer))
        panel.set_title(f"{task.replace('_', ' ')}, {length:,} tokens", fontsize=9)
        panel.set_ylabel(TITLES[shown], fontsize=8)
        budgets = sorted({_entries(row) for row in group if row["budget"]})
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [str(budget) for budget in budgets])
        panel.minorticks_off()
        if metric is None:
            panel.set_ylim(-0.04, 1.06)
    for panel in axes.flat[len(groups) :]:
        panel.remove()
    for panel in axes.flat[max(0, len(groups) - columns) : len(groups)]:
        panel.set_xlabel("budget (entries per KV head)", fontsize=9)
    finish(figure)
    return figure


def plot_pareto(rows: Sequence[Row]) -> "Figure":
    """Bytes of keys and values against quality (mean over the tasks), a panel for each length.

    The line joins the points that no other of the evicted caches beats in both; the oracle, which knows the answer, is
    shown and left out of it.

    Args:
        rows: see `summarise`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lengths = sorted({row["length"] for row in rows})
    figure = new_figure(max(5.2, 3.8 * len(lengths) + 0.4), 3.9)
    axes = figure.subplots(1, len(lengths), squeeze=False, sharey=True)
    for panel, length in zip(axes[0], lengths, strict=True):
        points = pareto_points([row for row in rows if row["length"] == length])
        for scorer in dict.fromkeys(point["scorer"] for point in points):
            own = [point for point in points if point["scorer"] == scorer]
            x, y = [point["kv_bytes"] / 2**20 for point in own], [point["quality"] for point in own]
            if own[0]["budget"] is None:
                panel.plot(x, y, "*", color="0.25", markersize=13, label=scorer)
                continue
            panel.plot(x, y, label=scorer, **_style(scorer) | {"linestyle": "none"})
        front = pareto_front([point for point in points if point["scorer"] != "oracle"])
        panel.plot(
            [p["kv_bytes"] / 2**20 for p in front], [p["quality"] for p in front], color="0.6", linewidth=1, zorder=0
        )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_title(f"{length:,} tokens", fontsize=9)
        panel.set_xlabel("keys and values of one prompt (MiB)")
        panel.set_ylim(-0.04, 1.06)
    axes[0, 0].set_ylabel("quality (mean over tasks)")
    finish(figure)
    return figure


def pareto_points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One point for each scorer and budget: ``kv_bytes`` and ``quality``, means over the tasks."""
    metrics = {
        task: quality_metric([row for row in rows if row["task"] == task]) for task in {r["task"] for r in rows}
    }
    points = []
    for scorer, budget in dict.fromkeys((row["scorer"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["scorer"], row["budget"]) == (scorer, budget)]
        points.append(
            {
                "scorer": scorer,
                "budget": budget,
                "kv_bytes": sum(row["kv_bytes"] for row in own) / len(own),
                "quality": sum(row[metrics[row["task"]]] for row in own) / len(own),
            }
        )
    return points


def pareto_front(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points that no other beats: none has at most their bytes and at least their quality. By rising bytes."""
    front: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["kv_bytes"], -p["quality"])):
        if not front or point["quality"] > front[-1]["quality"]:
            front.append(point)
    return front


def plot_entries(rows: Sequence[Row]) -> "Figure":
    """Where the budget went: what each head of each layer keeps, a map for each scorer and budget (mean of all rows).

    Args:
        rows: see `summarise`; those of the full cache are left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    cells: dict[tuple[str, int | float], list[Row]] = {}
    for row in rows:
        if "entries_by_head" in row:
            cells.setdefault((row["scorer"], row["budget"]), []).append(row)
    scorers, budgets = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    figure = new_figure(1.6 + 1.6 * len(scorers), 1.0 + 2.2 * len(budgets))
    axes = figure.subplots(len(budgets), len(scorers), squeeze=False, sharex=True, sharey=True)
    for (scorer, budget), every in cells.items():
        panel = axes[budgets.index(budget), scorers.index(scorer)]
        heads = [row["entries_by_head"] for row in every]
        mean = [
            [sum(counts) / len(every) for counts in zip(*layer, strict=True)] for layer in zip(*heads, strict=True)
        ]
        draw_entries(panel, mean, sum(map(_entries, every)) / len(every))
        panel.set_title(f"{scorer}, {budget}", fontsize=9)
    for panel in axes[:, 0]:
        panel.set_ylabel("evicted layer", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("KV head", fontsize=8)
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="entries kept, times the budget", shrink=0.9)
    return figure


def draw_entries(panel: Any, entries: Sequence[Sequence[float]], budget: float) -> None:
    """A map of what each head keeps, ``[layers][kv_heads]``, in colors from none to the most that a head may keep."""
    shares = [[count / budget for count in layer] for layer in entries]
    panel.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=MOST, interpolation="nearest")
    panel.tick_params(labelsize=8)


def save_plots(rows: Sequence[Row], directory: str | os.PathLike[str]) -> list[Path]:
    """Writes ``quality_by_budget.png``, ``nll_by_budget.png``, ``pareto.png`` and ``entries_by_head.png``.

    Returns:
        Their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = {
        "quality_by_budget": plot_by_budget(rows),
        "nll_by_budget": plot_by_budget(rows, "nll_gap"),
        "pareto": plot_pareto(rows),
        "entries_by_head": plot_entries(rows),
    }
    paths = [Path(directory) / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=150)
    return paths


def _style(scorer: str) -> dict[str, Any]:
    color, marker = STYLES[scorer]
    # Hollow, and the first on top: points that coincide stay visible.
    first = scorer == "lookahead"
    return {
        "color": color,
        "marker": marker,
        "markersize": 5 if first else 8,
        "markerfacecolor": color if first else "none",
        "zorder": 4 if first else 3,
    }


def _entries(row: Row) -> int:
    """Entries that a row's budget is; rows of earlier versions have budgets that are numbers of entries."""
    return row.get("entries", row["budget"])


def _groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["length"]), []).append(row)
    return groups


def finish(figure: "Figure", fontsize: int = 8) -> None:
    """Gives all panels the look of this package's figures, and the figure one legend below them."""
    for panel in figure.axes:
        panel.grid(color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=fontsize)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=fontsize)
