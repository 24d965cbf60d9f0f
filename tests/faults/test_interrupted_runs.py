"""Killed at any moment, or with the disk full, a run leaves the old state or the new one, and is resumed by the same
command."""

import json
from functools import partial
from tempfile import gettempdir

import pytest
import torch
from children import Killed, command_line, count_changes, full_disk, killed_at, killed_by_size, run
from models import needs_adapter_methods
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lkq_hf.training.checkpoints import last_complete_checkpoint


def targets(files, out):
    return [
        "generate-targets", files / "base", "--prompts", files / "prompts.jsonl", "--out", out / "result",
        "--dtype", "float32", "--validation-fraction", "0.3", "--max-new-tokens", "4", "--shard-size", "2",
        "--device", "cpu",
    ]  # fmt: skip


def train(files, out):
    return [
        "train", files / "base", "--targets", files / "targets", "--out", out / "result", "--base-model-name",
        "someone/something", "--num-lookahead-tokens", "4", "--rank", "2", "--max-steps", "4", "--save-steps", "2",
        "--eval-steps", "4", "--batch-size", "2", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip


def quantize(files, out):
    return [
        "quantize", files / "base", "--dataset", files / "calibration.jsonl", "--out", out / "result",
        "--num-samples", "4", "--model-seqlen", "32", "--group-size", "32", "--device", "cpu",
    ]  # fmt: skip


def evaluate(files, out):
    return [
        "evaluate", "perplexity", files / "base", "--window", "64", "--max-windows", "6", "--text",
        files / "texts.jsonl", "--batch-size", "2", "--device", "cpu", "--out", out / "result",
    ]  # fmt: skip


COMMANDS = {"targets": targets, "train": train, "quantize": quantize, "evaluate": evaluate}


def found(command, result):
    """What a run has made: from pieces that may be there before its end, and of the whole only what is complete."""
    if command == "targets":
        return {str(path.relative_to(result)): path.read_bytes() for path in result.glob("*/shard-*")}
    if command == "train":
        weights = result / "adapter_model.safetensors"
        return load_file(weights) if weights.exists() else {}
    if command == "quantize":
        if not result.exists():
            return {}
        AutoModelForCausalLM.from_pretrained(result)
        return {path.name: path.read_bytes() for path in result.iterdir()}
    path = result / "results.json"
    return {str(index): row for index, row in enumerate(json.loads(path.read_text())["rows"])} if path.exists() else {}


def assert_equal(found, expected):
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            # As far as the state of Adam says, see tests/training/test_trainer.py.
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
        else:
            assert value == expected[name], name


@pytest.fixture(scope="session")
def undisturbed(files, tmp_path_factory):
    """What each command makes, and how many changes on the disk that takes."""
    results = {}
    for command, arguments in COMMANDS.items():
        out = tmp_path_factory.mktemp(command)
        changes = count_changes(out, command_line, *arguments(files, out))
        if command == "targets":
            (out / "result").rename(files / "targets")
            results[command] = found(command, files / "targets"), changes
        else:
            results[command] = found(command, out / "result"), changes
        assert results[command][0] and changes > 5
    return results


def check_resumed(command, files, out, undisturbed):
    """After a fault: what is there is right, the same command succeeds, and then everything is there."""
    expected, _ = undisturbed[command]
    before = found(command, out / "result")
    assert_equal(before, expected)
    if command == "quantize" and before:  # a checkpoint appears whole, and is never overwritten
        assert before.keys() == expected.keys()
        with pytest.raises(RuntimeError, match="exists and is not an empty directory"):
            run(command_line, *COMMANDS[command](files, out))
        return
    if command == "train" and (last := last_complete_checkpoint(out / "result" / "checkpoints")) is not None:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "base"), last)
    run(command_line, *COMMANDS[command](files, out))
    after = found(command, out / "result")
    assert after.keys() == expected.keys()
    assert_equal(after, expected)
    if command == "quantize":
        assert [path.name for path in out.iterdir()] == ["result"], "nothing else is left"


def kill_and_resume(command, files, out, undisturbed, change):
    with pytest.raises(Killed, match="SIGKILL"):
        run(command_line, *COMMANDS[command](files, out), fault=partial(killed_at, out, change))
    check_resumed(command, files, out, undisturbed)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_between_two_changes(command, part, files, tmp_path, undisturbed):
    kill_and_resume(command, files, tmp_path, undisturbed, int(part * undisturbed[command][1]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_before_each_change(command, files, tmp_path, undisturbed):
    for change in range(undisturbed[command][1]):
        out = tmp_path / str(change)
        out.mkdir()
        kill_and_resume(command, files, out, undisturbed, change)


# Of the files that a command writes, the first that is larger is cut there.
SIZES = {
    "targets": [0, 40, 1500],
    "train": [0, 500, 4000, 20_000, 50_000],
    "quantize": [0, 100, 5000, 100_000, 1_000_000],
    "evaluate": [0, 150, 600],
}
CUTS = [
    pytest.param(command, size, marks=[] if size == SIZES[command][-1] else pytest.mark.slow)
    for command in COMMANDS
    for size in SIZES[command]
]


@pytest.mark.parametrize(("command", "size"), CUTS)
def test_killed_in_the_middle_of_a_file(command, size, files, tmp_path, undisturbed):
    with pytest.raises(Killed, match="SIGXFSZ"):
        run(command_line, *COMMANDS[command](files, tmp_path), fault=partial(killed_by_size, size))
    check_resumed(command, files, tmp_path, undisturbed)


@pytest.mark.parametrize(("command", "size"), CUTS)
def test_the_disk_is_full(command, size, files, tmp_path, undisturbed):
    with pytest.raises(RuntimeError) as error:
        run(command_line, *COMMANDS[command](files, tmp_path), fault=partial(full_disk, size))
    # In the words of the system, and of torch.
    assert "File too large" in str(error.value) or "unexpected pos" in str(error.value)
    places = [str(tmp_path / "result"), f"{gettempdir()}/lkq-hf-"]  # the second one is the dry run's
    last = str(error.value).strip().splitlines()[-1]
    assert any(place in last for place in places), "where there is no room"
    check_resumed(command, files, tmp_path, undisturbed)


def save(files, out):
    model = AutoModelForCausalLM.from_pretrained(files / "base")
    model.load_adapter(str(files / "adapter"))
    model.save_pretrained(out)


@needs_adapter_methods
@pytest.mark.parametrize("size", [0, 200, 4000, 40_000])
@pytest.mark.parametrize("fault", [killed_by_size, full_disk])
def test_saving_an_adapter_by_transformers(fault, size, files, tmp_path):
    """Whatever is there afterwards is whole, or it is refused."""
    with pytest.raises((Killed, RuntimeError)):
        run(save, files, tmp_path, fault=partial(fault, size))
    model = AutoModelForCausalLM.from_pretrained(files / "base")
    with pytest.raises(Exception, match=r"(?i)header|deserializ|incomplete|json|expecting|not found|no such file"):
        model.load_adapter(str(tmp_path))
    run(save, files, tmp_path)
    assert_equal(*(load_file(directory / "adapter_model.safetensors") for directory in (tmp_path, files / "adapter")))
