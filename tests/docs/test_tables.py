"""benchmarks/tables.py: declared tables, on small results."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    return tables


RESULTS = {
    "hardware": {"gpu": "NVIDIA H100 80GB", "versions": {"torch": "2.11"}},
    "turn": 64,
    "cells": [{"batch": 1, "ms": 2.5, "lost": [1.0, 2.0]}, {"batch": 16, "bytes": 2**21, "ms": 3.0, "earlier": True}],
    "by name": {"one": {"ms": 1.0}, "two": {"ms": 4.0}},
}


def test_a_path_leads_into_the_results(tables):
    assert tables.look_up(RESULTS, "cells::batch=16&ms=3.0::bytes") == 2**21
    assert tables.look_up(RESULTS, "cells::0::lost::mean") == 1.5
    assert tables.look_up(RESULTS | {"name": "two"}, "by name::<name>::ms") == 4.0
    assert tables.look_up(RESULTS, "machine") == "NVIDIA H100 80GB; torch 2.11"
    assert tables.look_up(RESULTS, "gpu") == "H100"
    for path in ("cells::batch=2::ms", "cells::7", "turn::ms", "none"):
        with pytest.raises(LookupError):
            tables.look_up(RESULTS, path)


def test_a_cell_is_formatted(tables):
    row = RESULTS["cells"][1] | RESULTS
    assert tables.filled("{bytes:MiB*.1f} MiB, {ms:batch*.0f}, {ms:100*,.0f} %", row) == "2.0 MiB, 48, 300 %"
    assert tables.filled("{none:.1f|out of memory} of {turn}", row) == "out of memory of 64"
    assert tables.filled("{none:.1f} of {turn}", row) == ""


def test_a_table_leaves_out_empty_columns(tables, monkeypatch):
    columns = {"batch{turn}": "{batch}{mark}", "MiB": "{bytes:MiB*.0f}", "none": "{none}"}
    monkeypatch.setitem(tables.DECLARATIONS, "a", {"rows": "cells", "columns": columns})
    assert tables.declared("a", RESULTS) == "| batch64 | MiB |\n| --- | --- |\n| 1 |  |\n| 16 * | 2 |"
    named = {"rows": "by name", "where": {"name": "two"}, "columns": {"": "{name}", "ms": "{ms:.0f}"}}
    monkeypatch.setitem(tables.DECLARATIONS, "b", named)
    assert tables.declared("b", RESULTS) == "|  | ms |\n| --- | --- |\n| two | 4 |"
    titled = {"rows": {"first": "by name", "gone": "missing", "own": {"ms": 5}}, "columns": {"": "{title} {ms|}"}}
    monkeypatch.setitem(tables.DECLARATIONS, "c", titled)
    assert tables.declared("c", RESULTS) == "|  |\n| --- |\n| first  |\n| own 5 |"
