import pytest

from lkq_hf.evaluation.tables import eviction_table, table


def row(task, scorer, budget, quality, size, **more):
    return {"task": task, "length": 512, "examples": 2, "scorer": scorer, "budget": budget, "answer_match": quality,
            "token_agreement": 0.5, "nll_gap": 1 - quality, "kv_bytes": size * 2**20} | more  # fmt: skip


ROWS = [
    row("needle", "full cache", None, 1.0, 40),
    row("needle", "lookahead", 64, 0.5, 5),
    row("needle", "snapkv", 64, 0.75, 5),
    row("needle", "lookahead", 128, 0.75, 10),
    row("needle", "snapkv", 128, 0.25, 10),
    row("needle", "oracle", 64, 1.0, 5),
]


def test_a_table_leaves_out_what_no_row_has():
    lines = table([{"a": 1, "b": "x"}, {"a": None, "b": "yy", "c": None}], {"b": "name", "a": "count", "c": "none"})
    assert lines.splitlines() == ["| name | count |", "| ---- | ----: |", "| x    |     1 |", "| yy   |       |"]


def test_the_table_of_an_evaluation():
    text = eviction_table([*ROWS, row("summarise", "full cache", None, 1.0, 40) | {"examples": 1}])
    assert "needle, 512 tokens, 2 prompts" in text and "summarise, 512 tokens, 1 prompt\n" in text
    assert "5.000" in next(line for line in text.splitlines() if "snapkv" in line)


def test_the_pareto_front():
    from lkq_hf.evaluation.plots import pareto_front, pareto_points

    points = pareto_points([*ROWS, *(row("two", each["scorer"], each["budget"], 0.0, 1) for each in ROWS)])
    assert {(p["scorer"], p["budget"]): p["quality"] for p in points}["lookahead", 128] == 0.375
    front = pareto_front([point for point in pareto_points(ROWS) if point["scorer"] != "oracle"])
    # As good with more bytes, or worse with as many, is beaten.
    assert [(point["scorer"], point["budget"]) for point in front] == [("snapkv", 64), ("full cache", None)]


def test_the_figure_of_heads_shows_the_mean_of_all_rows():
    pytest.importorskip("matplotlib")
    from lkq_hf.evaluation.plots import plot_entries

    kept = {"needle": [[32.0, 96.0], [64.0, 64.0]], "open": [[96.0, 32.0], [32.0, 96.0]]}
    rows = [
        row(task, scorer, 64, 1.0, 5, entries_by_head=entries)
        for task, entries in kept.items()
        for scorer in ("lookahead", "snapkv")
    ]
    figure = plot_entries([*rows, row("needle", "full cache", None, 1.0, 40)])
    maps = {axes.get_title(): axes.images[0].get_array().tolist() for axes in figure.axes if axes.images}
    assert maps == {key: [[1.0, 1.0], [0.75, 1.25]] for key in ("lookahead, 64", "snapkv, 64")}


def test_the_figures_show_the_rows():
    pytest.importorskip("matplotlib")
    from lkq_hf.evaluation.plots import plot_by_budget, plot_pareto

    open_answers = [{key: value for key, value in row("open", each["scorer"], each["budget"], 1.0, 1).items()
                     if key != "answer_match"} for each in ROWS]  # fmt: skip
    figure = plot_by_budget([*ROWS, *open_answers])
    needle, answers = figure.axes
    lines = {line.get_label(): line for line in needle.lines}
    assert list(lines["lookahead"].get_xdata()) == [64, 128] and list(lines["snapkv"].get_ydata()) == [0.75, 0.25]
    assert list(lines["full cache"].get_ydata()) == [1.0, 1.0]
    # Without right answers, a task is judged by agreement with the full cache.
    assert all(set(line.get_ydata()) == {0.5} for line in answers.lines)
    (panel,) = plot_pareto(ROWS).axes
    points = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines}
    assert points["snapkv"] == ([5, 10], [0.75, 0.25]) and points["full cache"] == ([40], [1.0])
