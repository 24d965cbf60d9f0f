"""benchmarks/scaling.py: it measures, its costs follow from the figures, and the page holds what it writes."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
scaling, checks = (importlib.import_module(name) for name in ("scaling", "scaling_checks"))


def figures(seconds=1.0, besides=2e9, name="8B"):
    """Round figures for a model of `name`'s size."""
    sizes = scaling.MODELS[name]
    weights = 2 * scaling.layer_parameters(sizes)
    rest = 2 * scaling.parameters(sizes) - sizes["num_hidden_layers"] * weights + besides
    return {
        "training": {"seconds": {"layer": seconds, "rest": 0.0}, "bytes": {"layer": weights, "rest": rest}},
        "decoding": {"prompt": {"layer": 0.0, "rest": 0.0}, "token": {"layer": 0.0, "rest": 0.0}},
        "calibration": {"seconds": 1e-4, "block": 2.0, "bytes": 5e9},
        "solving": {"rows": 8.0, "rest": 1.0, "bytes": 6e9},
    }


def test_sizes_are_those_of_the_models():
    counts = {name: round(scaling.parameters(sizes) / 1e9, 1) for name, sizes in scaling.MODELS.items()}
    assert counts == {"8B": 8.0, "70B": 70.6, "405B": 405.9}


def test_gpus_share_the_prompts_of_a_step():
    alone, two = (scaling.training_cost("8B", figures(), gpus) for gpus in (1, 2))
    assert alone.hours == pytest.approx(157 * 64 * 32 / 3600)
    assert two.hours == pytest.approx(alone.hours / 2)
    assert (alone.plan, two.plan) == ("one GPU", "DDP")
    assert alone.gib == pytest.approx((2 * 8.03e9 + 2e9) / 2**30, rel=1e-2)


def test_a_model_larger_than_a_gpu_is_sharded():
    costs = [scaling.training_cost("70B", figures(name="70B"), gpus) for gpus in (1, 8)]
    assert costs[0] == "does not fit" and costs[1].plan == "FSDP2"
    assert costs[1].gib < scaling.ASSUMED["GPU memory, GiB"]
    local = 157 * 8 * 80 / 3600
    gathered = 157 * 8 * 4 * 2 * scaling.parameters(scaling.MODELS["70B"]) * 7 / 8 / 3600
    assert costs[1].hours == pytest.approx(local + gathered / (1e9 * scaling.ASSUMED[scaling.BETWEEN_GPUS]))
    measured = scaling.training_cost("70B", figures(name="70B"), 8, {scaling.BETWEEN_GPUS: 100.0})
    assert measured.hours == pytest.approx(local + gathered / 100e9)


def test_only_what_rows_take_is_shared_of_a_solve():
    costs = {gpus: scaling.quantization_cost("8B", figures(), gpus).hours * 3600 / 32 for gpus in (1, 4)}
    tokens = scaling.RECIPE["calibration_tokens"] * 1e-4
    assert costs[1] == pytest.approx(tokens + 8 + 1 + 2, rel=0.02)  # and a little for loading
    assert costs[4] == pytest.approx((tokens + 8) / 4 + 1 + 2, rel=0.05)


def test_nothing_is_said_of_what_was_not_measured():
    assert scaling.tables({"models": {}}) == scaling.NOT_MEASURED
    text = scaling.tables({"models": {"8B": figures() | {"solving": None}}})
    assert text.count("not measured") == 2 * 7 * 2  # the other two models
    assert text.count("does not fit") == 7  # what failed of the first


@pytest.mark.slow
def test_it_measures(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\n{scaling.END}\nafter\n")
    paths = ["--results", str(tmp_path / "results.json"), "--page", str(page)]
    scaling.main(["measure", "--model", "8B", "--device", "cpu", "--shrink", "32", *paths])
    scaling.main(["report", *paths])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["models"]["8B"].keys() == {"tokens", "training", "decoding", "calibration", "solving"}
    assert found["models"]["8B"]["training"]["seconds"]["layer"] > 0
    assert found["models"]["8B"]["solving"]["rest"] > 0
    assert found["models"]["8B"]["calibration"]["block"] > 0
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n")
    assert "the figures mean nothing" in text and "(DDP)" in text


@pytest.mark.slow
def test_runs_are_compared_with_what_is_computed(tmp_path):
    page, file, more = (tmp_path / name for name in ("page.md", "results.json", "more.json"))
    page.write_text(f"{scaling.BEGIN}\n{scaling.END}\n")
    checks.main([*checks.RUNS, "--device", "cpu", "--shrink", "32", "--results", str(more)])
    runs = json.loads(more.read_text())["checks"]
    tokens = scaling.RECIPE["calibration_tokens"]
    assert [(run["work"], run["tokens"], run["gpus"]) for run in runs] == [
        ("training", 4096, 1), ("training", 8192, 1), ("eviction", 4096, 1), ("quantizing", tokens, 1),
        ("experts", tokens // 4, 1), ("refining", tokens // 4, 1), ("sharing out", 4096, 1),
    ]  # fmt: skip
    assert all(run["seconds"] > 0 for run in runs)
    results = {"models": {"8B": figures() | {"tokens": 4096}}, "links": {scaling.BETWEEN_GPUS: 123.0}}
    file.write_text(json.dumps(results))
    for _ in range(2):  # A run that is made again takes the place of the first.
        scaling.main(["report", "--results", str(file), "--page", str(page), "--merge", str(more)])
    found = scaling.merged(json.loads(file.read_text()), [])
    assert found["checks"] == runs
    assert [scaling.predicted(run, found) for run in runs] == [
        pytest.approx((32.0, 2 * scaling.parameters(scaling.MODELS["8B"]) + 2e9)),
        None,
        None,
        pytest.approx((2 * (tokens * 1e-4 + 11), 6e9)),
        None,
        None,
        None,
    ]
    text = page.read_text()
    assert "| a training step: 32 layers of the 8B model, 4,096 tokens | 1 |" in text
    assert "| 123.0 (measured) |" in text


def test_a_model_cut_among_gpus_is_one_layer_in_memory_before():
    sizes = scaling.sizes_of("8B", 32)
    model = checks._build_repeated(sizes, 5, "cpu", 32)
    places = {layer.mlp.up_proj.weight.data_ptr() for layer in model.model.layers}
    assert len(places) == 1 and len({id(layer.mlp.up_proj.weight) for layer in model.model.layers}) == 5
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_the_page_is_what_the_results_say():
    results = json.loads(scaling.RESULTS.read_text()) if scaling.RESULTS.exists() else {"models": {}}
    assert scaling.generated(results) in scaling.PAGE.read_text(encoding="utf-8")
