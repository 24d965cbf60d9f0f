"""Budgets that are fractions of the prompt, in `evaluate` and `inspect` as in LookaheadCache."""

import json

import pytest
from small_checkpoint import save_small_checkpoint, save_texts

from lkq_hf.cli.checks import budgets_of
from lkq_hf.evaluation.eviction import check_budgets
from lkq_hf.evaluation.plots import plot_by_budget


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    save_small_checkpoint(directory / "base", directory / "adapter")
    save_texts(directory)
    return directory


def test_a_fraction_is_the_number_of_entries_that_it_stands_for(files, tmp_path, monkeypatch, capsys):
    import sys

    from lkq_hf.cli import main

    def rows(budgets):
        out = tmp_path / budgets
        arguments = ["evaluate", "eviction", files / "base", "--adapter", files / "adapter", "--device", "cpu"]
        arguments += ["--text", files / "handbook.txt", "--tasks", "needle", "--length", "300,400", "--examples", "1"]
        options = [*arguments, "--budgets", budgets, "--no-plots", "--out", out]
        monkeypatch.setattr(sys, "argv", ["lkq-hf", *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
        return json.loads((out / "results.json").read_text())["rows"]

    found, expected = rows("0.1"), rows("30,40")
    cells = {(row["length"], row["scorer"], row["entries"]): row for row in expected}
    assert {row["budget"] for row in found} == {None, 0.1}
    assert {row["entries"] for row in found if row["length"] == 300} == {None, 30}
    assert {row["entries"] for row in found if row["length"] == 400} == {None, 40}
    for row in found:
        same = cells[row["length"], row["scorer"], row["entries"]]
        assert {**row, "budget": None} == {**same, "budget": None}
    pytest.importorskip("matplotlib")
    ticks = [tick.get_text() for tick in plot_by_budget(found).axes[0].get_xticklabels()]
    assert ticks == ["30"]


def test_inspecting_with_a_fraction(files, tmp_path, monkeypatch, capsys):
    import sys

    from lkq_hf.cli import main

    arguments = ["inspect", files / "base", "--prompt", files / "prompt.txt", "--device", "cpu", "--json"]
    options = [*arguments, "--budget", "0.1", "--out", tmp_path / "report.html"]
    monkeypatch.setattr(sys, "argv", ["lkq-hf", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert not ended.value.code, captured.err
    result = json.loads(captured.out)
    assert result["budget"] == round(0.1 * result["tokens"])


@pytest.mark.parametrize(("text", "found"), [("64,128", [64, 128]), ("0.1, .25,64", [0.1, 0.25, 64]), ("64,64", [64])])
def test_what_budgets_can_be(text, found):
    assert budgets_of("--budgets", text) == found


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "1.5", "1.", "many", "64,many", "", "nan", "1e3"])
def test_what_budgets_cannot_be(text):
    with pytest.raises(ValueError, match="--budgets expects"):
        budgets_of("--budgets", text)


def test_budgets_are_sorted_and_checked():
    assert check_budgets([0.5, 64, 0.1, 8]) == [8, 64, 0.1, 0.5]
    for wrong in ([0], [1.5], [0.0], []):
        with pytest.raises(ValueError, match="a positive number of entries or a fraction"):
            check_budgets(wrong)
