"""The command line in several processes: the files that one process writes, also after one was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from workers import command_line, killed_command_line, launch, sharded_command_line


def run(*arguments, processes=1):
    """What the command printed, in each process."""
    return printed_by(launch(command_line, *arguments, processes=processes))


def printed_by(results):
    assert [code for code, _ in results] == [0] * len(results), results
    return [printed for _, printed in results]


def targets(files, out, device="cpu"):
    return [
        "generate-targets", files / "base", "--prompts", files / "prompts.jsonl", "--out", out, "--dtype", "float32",
        "--validation-fraction", "0.2", "--max-new-tokens", "5", "--shard-size", "4", "--device", device,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made_by_one(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("targets")
    run(*targets(files, out))
    return out


def contents(out):
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.suffix == ".parquet"
    }


def test_processes_generate_the_targets_of_one(files, made_by_one, tmp_path):
    printed = run(*targets(files, tmp_path), processes=3)
    assert contents(tmp_path) == contents(made_by_one) and len(contents(tmp_path)) == 6
    assert "train: 18 prompts" in printed[0] and "train: " not in printed[1]  # of all processes, told by one


@pytest.mark.parametrize("killed", [0, 1])
def test_target_generation_goes_on_after_a_process_was_killed(files, made_by_one, tmp_path, killed):
    killed_command_line(*targets(files, tmp_path), kill=(killed, "lkq_hf.training.targets", "_respond", 1))
    before = {name for name in contents(tmp_path) if ".partial-" not in name}
    assert 0 < len(before) < 6
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    run(*targets(files, tmp_path), processes=3)
    assert contents(tmp_path) == contents(made_by_one)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in times.items())


def evaluation(files, out, command, device="cpu"):
    small = [
        "--text", files / "texts.jsonl", "--device", device, "--dtype", "float32", "--batch-size", "2", "--out", out,
    ]  # fmt: skip
    if command == "perplexity":
        compared = ["--reference", files / "base"]
        return ["evaluate", "perplexity", files / "base", *compared, "--window", "64", "--max-windows", "11", *small]
    return [
        "evaluate", "eviction", files / "base", "--adapter", files / "adapter", "--tasks", "continue,needle",
        "--length", "96", "--examples", "3", "--budgets", "16", "--no-plots", *small,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "step"),
    [
        ("perplexity", ("lkq_hf.evaluation.perplexity", "token_statistics")),
        ("eviction", ("lkq_hf.evaluation.eviction:EvictionEvaluator", "measure")),
    ],
)
def test_an_evaluation_goes_on_after_a_process_was_killed(files, tmp_path, command, step):
    run(*evaluation(files, tmp_path / "one", command))
    killed_command_line(*evaluation(files, tmp_path / "two", command), kill=(1, *step, 1))
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "two" / "journal").glob("[!.]*")}
    assert finished and not (tmp_path / "two" / "results.json").exists()
    run(*evaluation(files, tmp_path / "two", command), processes=3)
    assert_same_results(tmp_path / "one", tmp_path / "two", 3)
    for name, time in finished.items():
        assert (tmp_path / "two" / "journal" / name).stat().st_mtime_ns == time


def assert_same_results(first, second, processes):
    """Of an evaluation by one process, and another by several."""
    one, two = (json.loads((directory / "results.json").read_text()) for directory in (first, second))
    assert two["environment"]["hardware"]["processes"] == processes
    for expected, found in zip(one["rows"], two["rows"], strict=True):
        numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
        # Where a process finds its memory decides how it sums, in the last bit.
        assert found == {**expected, **{name: pytest.approx(value, rel=1e-6) for name, value in numbers.items()}}
    for expected, found in zip(one.get("records", []), two.get("records", []), strict=True):
        assert found["task"] == expected["task"]
        for name, cell in expected["caches"].items():
            assert found["caches"][name]["tokens"] == cell["tokens"]
    assert (first / "results.md").read_text() == (second / "results.md").read_text()


def training(files, made, out):
    return [
        "train", files / "base", "--targets", made, "--out", out, "--base-model-name", "someone/something",
        "--num-lookahead-tokens", "4", "--rank", "2", "--max-steps", "3", "--batch-size", "4", "--device-batch-size",
        "3", "--profile-budgets", "2,4", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip


def assert_same_adapters(one, two):
    profiles = [json.loads((Path(each) / "adapter_config.json").read_text())["budget_profile"] for each in (one, two)]
    for budget in ("2", "4"):
        # Weights that differ in the last digits may order a few entries otherwise.
        np.testing.assert_allclose(profiles[0][budget], profiles[1][budget], atol=0.1)
    one, two = (load_file(Path(directory) / "adapter_model.safetensors") for directory in (one, two))
    assert one.keys() == two.keys()
    for name, value in one.items():
        # A tenth of a step of Adam, see test_training.py.
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def trained_by_one(files, made_by_one, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    run(*training(files, made_by_one, out))
    return out


def test_fsdp_trains_the_adapter_of_one_process(files, made_by_one, trained_by_one, tmp_path):
    results = launch(sharded_command_line, *training(files, made_by_one, tmp_path))
    assert [code for code, _ in results] == [0, 0], results
    assert_same_adapters(trained_by_one, tmp_path)


def test_torchrun_trains_the_adapter_of_one_process(files, made_by_one, trained_by_one, tmp_path):
    # What `accelerate launch` starts on GPUs; for CPUs alone it would need MPI.
    process = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "lkq_hf.cli",
            *map(str, training(files, made_by_one, tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("validation KL") == 1
    assert_same_adapters(trained_by_one, tmp_path)
    records = [json.loads((directory / "training.json").read_text()) for directory in (trained_by_one, tmp_path)]
    assert records[0]["metrics"]["eval_loss"] == pytest.approx(records[1]["metrics"]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [(["--batch-size", "5"], 1, "--batch-size 5 cannot be divided among 2 processes"),
     (["--device-batch-size", "0"], 2, "Invalid value for '--device-batch-size'")],
)  # fmt: skip
def test_steps_that_cannot_be_divided_are_refused(files, made_by_one, tmp_path, options, code, message):
    for found, printed in launch(command_line, *training(files, made_by_one, tmp_path), *options):
        assert found == code and message in printed
