"""Commands that take their options from a YAML file too: `lkq-hf train --config`."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from datasets import Dataset

from lkq_hf.cli.dataclass_command import InFile, Shown, dataclass_command, options_as_yaml, read_options
from lkq_hf.cli.train_options import TrainOptions
from lkq_hf.training import LookaheadTrainingArguments


@dataclass(frozen=True, kw_only=True)
class Some:
    name: Annotated[str, typer.Argument()]
    files: Annotated[list[Path] | None, Shown("Files.")] = None
    number: Annotated[int, Shown("A number.", min=1)] = 3
    rate: Annotated[float, InFile("A rate.", max=1)] = 0.5
    fast: Annotated[bool, InFile("Whether it is fast.")] = True
    words: Annotated[str, InFile("Words.")] = "a,b"


@pytest.fixture
def called(tmp_path):
    """Calls a command with these options, and returns what reaches it and what was printed to stderr."""

    def call(*arguments, file=None):
        if file is not None:
            (tmp_path / "options.yaml").write_text(file)
            arguments = (*arguments, "--config", str(tmp_path / "options.yaml"))
        found = []
        app = typer.Typer(add_completion=False)
        app.command()(dataclass_command(Some, found.append))
        from typer.testing import CliRunner

        result = CliRunner().invoke(app, list(map(str, arguments)))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return (found[0] if found else None), result.output

    return call


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(called):
    assert called("n")[0] == Some(name="n")
    file = "files: [a, b]\nnumber: 4\nrate: 3e-3\nfast: false\nwords: 64\n"
    expected = {"name": "n", "files": [Path("a"), Path("b")], "rate": 0.003, "fast": False, "words": "64"}
    assert called("n", file=file)[0] == Some(**expected, number=4)
    assert called("n", "--number", 5, file=file)[0] == Some(**expected, number=5)
    assert called("n", file="files: one.txt")[0].files == [Path("one.txt")]
    assert called("n", file="files:\n# nothing else")[0] == Some(name="n")
    assert called("n", "--files", "c", "--files", "d")[0].files == [Path("c"), Path("d")]


def test_an_option_of_the_file_on_the_command_line_warns(called):
    options, printed = called("n", "--rate", 0.25, "--no-fast", "--number", 2)
    assert options == Some(name="n", rate=0.25, fast=False, number=2)
    assert "--rate belongs into the file of --config, as rate: 0.25" in printed and "as fast: False" in printed
    assert "--number" not in printed


def test_help_shows_few_and_a_file_all(called):
    _, shown = called("--help")
    assert "--number" in shown and "Default: 3." in shown and "--rate" not in shown and "--fast" not in shown
    _, printed = called("--help-config")
    assert yaml.safe_load(printed) == {"files": None, "number": 3, "rate": 0.5, "fast": True, "words": "a,b"}
    assert "# A rate.\nrate: 0.5\n" in printed


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("rat: 1", "has 'rat', which is no option; expected some of files, number, rate, fast, words"),
        ("name: n", "has 'name', which is no option"),
        ("- a\n- b", "should hold options, each as `name: value`, found list"),
        ("a: [", "is not YAML"),
        ("number: 0", r"number should be int \(min 1\), found 0"),
        ("number: 1.5", r"number should be int \(min 1\), found 1.5"),
        ("number: true", r"number should be int \(min 1\), found True"),
        ("number:", r"number should be int \(min 1\), found None"),
        ("rate: 2", r"rate should be float \(max 1\), found 2"),
        ("rate: much", r"rate should be float \(max 1\), found 'much'"),
        ("fast: 1", "fast should be bool, found 1"),
        ("files: [3]", "files should be Path, found 3"),
    ],
)
def test_files_that_cannot_be_are_refused(called, file, message):
    with pytest.raises(ValueError, match=f"options.yaml:? {message}"):
        called("n", file=file)


def test_train_shows_few_options_and_its_file_has_all(run, tmp_path):
    code, shown, _ = run("train", "--help")
    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("  -")]
    assert code == 0 and len(listed) <= 15, listed
    (tmp_path / "train.yaml").write_text(options_as_yaml(TrainOptions))
    assert TrainOptions(
        model="m", out=Path("o"), **read_options(TrainOptions, tmp_path / "train.yaml")
    ) == TrainOptions(model="m", out=Path("o"))


def test_its_defaults_are_the_trainers():
    names = {"learning_rate", "importance_heads", "importance_power", "eviction_weight", "recompute"}
    for field in fields(LookaheadTrainingArguments):
        if field.name in names:
            names.remove(field.name)
            assert field.default == getattr(TrainOptions, field.name), field.name
    assert not names


def test_a_training_by_a_file(run, checkpoint, tmp_path):
    rows = [{"input_ids": list(range(3, 15)), "response_ids": [5, 6, 7]}] * 2
    for part in ("train", "validation"):
        (tmp_path / "targets" / part).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "targets" / part / "shard-00000000.parquet")
    (tmp_path / "train.yaml").write_text(
        f"targets: {tmp_path / 'targets'}\nrank: 2\nnum-lookahead-tokens: 3\nmax_steps: 1\nlearning_rate: 1e-2\n"
        "batch_size: 4\ndtype: float32\ndevice: cpu\nprofile_budgets: ''\n"
    )
    out = tmp_path / "out"
    code, _, err = run(
        "train", checkpoint / "base", "--out", out, "--config", tmp_path / "train.yaml", "--batch-size", 2
    )
    assert code == 0, err
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["num_lookahead_tokens"]) == (2, 3)
    note = json.loads((out / "checkpoints" / "run.json").read_text())
    assert (note["learning_rate"], note["batch_size"], note["max_steps"]) == (0.01, 2, 1)
    (tmp_path / "train.yaml").write_text("rnak: 2\n")
    code, _, err = run("train", checkpoint / "base", "--out", out, "--config", tmp_path / "train.yaml")
    assert code == 1 and "has 'rnak', which is no option; expected some of documents, targets" in err
