"""The benchmarks' small runs: every cell of theirs is measured, without an error."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from small_checkpoint import save_small_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(tmp_path, run_script):
    """Runs a script and reads its results."""

    def run(script, *options):
        out = tmp_path / "results.json"
        run_script(script, *options, "--out", out)
        return json.loads(out.read_text())

    return run


def test_decode_speed(run):
    cells = ("dynamic", "snapkv", "snapkv, static")
    options = ("--small", "--batches", "1", "--quantized", "4", "--minutes", "9", "--cells", *cells)
    found = run("decode_speed", *options)
    assert [cell.get("error") for cell in found["cells"]] == [None] * (len(cells) + 2)
    assert all(cell["tokens_per_second"] > 0 for cell in found["cells"]) and not found["skipped"]


def test_the_kernels_of_a_step(monkeypatch):
    """A step ends with the copy of its token; its last product is that of the vocabulary."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from decode_profile import Kernel, covered, groups_of, split

    names = ("elementwise", "_gemv_kernel", "_attend_kernel", "nvjet_tst", "ArgMaxOps", "Memcpy DtoH")
    kernels = [Kernel(name, 3.0 * place, 3.0 * place + 2) for place, name in enumerate(9 * names)]
    found = split(kernels, 9)
    assert len(found) == 9 - 4 and all([kernel.name for kernel in step] == list(names) for step in found)
    norms = "norms, rotary, elementwise"
    assert groups_of(found[0]) == [norms, "products", "attention", "vocabulary", "token choice", "copies"]
    assert covered(found[0]) == 2 * len(names) and covered([Kernel("", 0.0, 5.0), Kernel("", 1.0, 2.0)]) == 5


@pytest.mark.parametrize(
    ("script", "options", "key"),
    [
        ("training_memory", ("--layers", "2", "--lengths", "256"), "rows"),
        ("cpu_decode", ("--hidden", "256", "--layers", "1", "--tokens", "1"), "rows"),
        ("experts", ("--small",), "packed"),
        ("decode_profile", ("--small",), "steps"),
        ("host_time", ("--repeats", "1"), "results"),
        ("later_turns", ("--small",), "lookahead, parked, static"),
        ("refresh", ("--small", "--scorers", "snapkv"), "snapkv, growing"),
        ("prefill_peaks", ("--small",), "rows"),
    ],
)
def test_it_measures(run, script, options, key):
    assert run(script, *options)[key]


@pytest.mark.parametrize(
    ("eviction_weight", "features", "times_adapter"),
    [(0.0, "hidden", False), (0.5, "both", False), (0.5, "entry", False), (0.5, "entry", True)],
)
def test_a_gate_learns(tmp_path, run, eviction_weight, features, times_adapter):
    """What it was trained on, because the answers of a random model follow from nothing."""
    save_small_checkpoint(tmp_path / "model", tmp_path / "adapter")
    draw = random.Random(0)
    rows = [
        {"input_ids": draw.choices(range(500), k=length), "response_ids": draw.choices(range(500), k=answer)}
        for length, answer in [(96, 4), (128, 7), (96, 5), (128, 3)]
    ]
    for name in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(tmp_path / name / "prompts.parquet")
    model = ("--targets", tmp_path, "--model", tmp_path / "model", "--device", "cpu")
    adapter = ("--adapter", tmp_path / "adapter", "--times-adapter") if times_adapter else ("--adapter", "none")
    training = ("--max-steps", "40", "--batch-size", "4", "--width", "32", "--learning-rate", "2e-2")
    budgets = ("--budgets", "16", "32", "--eviction-budgets", "8", "32", "--eviction-weight", eviction_weight)
    found = run("gate", *model, *adapter, *training, *budgets, "--features", features)
    before, after = found["evaluations"][0], found["evaluations"][-1]
    assert after["losses"][0] < 0.6 * before["losses"][0]
    assert len(found["losses"][-1]) == (3 if eviction_weight else 2)
    assert set(before["SnapKV"]) == set(after["gate"])
    if times_adapter:
        assert before["gate"] == before["tokens"]  # it starts without effect


@pytest.mark.slow
def test_quantization_settings_are_measured(tmp_path):
    save_small_checkpoint(tmp_path / "model", tmp_path / "adapter")
    text = tmp_path / "text.txt"
    text.write_text((BENCHMARKS.parent / "LICENSE").read_text())
    windows, out = tmp_path / "windows.safetensors", tmp_path / "results"
    command = [sys.executable, str(BENCHMARKS / "quantization.py")]
    model = ["--model", str(tmp_path / "model"), "--seeds", "0"]
    sizes = ["--sizes", "4x64"]
    texts = ["--windows", "1", "--calibration", str(text), "--texts", str(text)]
    subprocess.run([*command, "prepare", *model, *sizes, *texts, "--out", str(windows)], check=True)
    subprocess.run([*command, "write", *model, *sizes, "--windows", str(windows)], check=True)
    methods = ["default", "GPTQ", "default, half own text"]
    chosen = ["--methods", *methods, "--bits", "4", "--schemes", "asym", "--samples", "4", "--length", "64"]
    groups = ["--groups", "default", "stages", "own", "--group-size", "32"]
    run = ["run", *model, "--windows", str(windows), *groups, *chosen, "--out", str(out)]
    for _ in range(2):  # nothing is repeated
        subprocess.run([*command, *run], check=True)
    found = json.loads(out.with_suffix(".json").read_text())
    assert [run.get("error") for run in found["runs"]] == [None, None, None]
    assert [run["method"] for run in found["runs"]] == methods
    dataset, again, half = (run["calibration"] for run in found["runs"])
    assert dataset == again != half
    assert all(set(run["increase"]) == set(found["full_precision"]) == {"text"} for run in found["runs"])


def test_the_pictures_are_drawn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pictures

    pictures.draw(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"eviction_quality.png", "quantization.png", "speed.png"}
