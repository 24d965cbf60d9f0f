"""The README's picture shows the recorded results."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "eviction_quality.json"


def test_the_lines_are_the_results(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    plot = importlib.import_module("pictures")
    results = json.loads(RESULTS.read_text())
    figure = plot.draw_eviction(results, 2048)
    rows = results["measurements"]["needle, 2048 tokens"]["rows"]
    lines = {line.get_label(): line for line in figure.axes[1].get_lines()}
    budgets = sorted({int(name.partition("/")[0]) for name in rows if "/" in name})
    mine = lines["LookaheadCache"]
    assert list(mine.get_xdata()) == budgets
    assert list(mine.get_ydata()) == [rows[f"{budget}/lookahead, adapter's pooling"]["accuracy"] for budget in budgets]
    best = [max(row["accuracy"] for name, row in rows.items() if name.startswith(f"{b}/snapkv")) for b in budgets]
    assert list(lines["SnapKV"].get_ydata()) == best
    assert set(lines["full cache (2,048 entries)"].get_ydata()) == {rows["full"]["accuracy"]}
