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


def test_prompts_share_a_forward_where_they_fit():
    together = {"seconds": {"layer": 4.5, "rest": 0.0}, "bytes": {"layer": 0.0, "rest": 0.0}}
    together["bytes"] = {"layer": figures()["training"]["bytes"]["layer"], "rest": 20e9}
    eight = scaling.training_cost("8B", figures() | {"together": together}, 1)
    assert eight.hours == pytest.approx(157 * 64 / 8 * 32 * 4.5 / 3600)
    # Of 64 prompts on 32 GPUs two are in a forward: a seventh of the way from one to eight.
    two = scaling.training_cost("8B", figures() | {"together": together}, 32)
    assert two.hours == pytest.approx(157 * 32 * (1 + 3.5 / 7) / 3600)
    together["bytes"]["rest"] = 200e9
    four = scaling.training_cost("8B", figures() | {"together": together}, 1)
    assert four.hours == pytest.approx(157 * 64 / 2 * 32 * (1 + 3.5 / 7) / 3600) and four.gib < 79


def run_of(work, seconds, prompts, **others):
    common = {"model": "8B", "layers": 32, "tokens": 4096, "plan": "one GPU", "gpus": 1, "bytes": 2**30}
    return common | {"work": work, "seconds": seconds, "prompts": prompts} | others


def test_stages_are_summed_up_once_all_are_measured():
    works = ["prompts", "answers", "training", "evaluating", "judging", "profile"]
    runs = [run_of(work, 3.6, 2) for work in works]
    assert scaling._stages({"checks": runs[1:]}) == []
    slower = [run_of("answers", 1.9, 1), run_of("training", 1.0, 8, plan="DDP", gpus=2)]
    title, text = scaling._stages({"checks": slower + runs})
    assert "documents" in title
    prompts = 2 * 10_256 + 10_000 + 5 * (256 + 128) + 64  # evaluated after 50, 100, 150 and 157 steps, and at the end
    assert f"| all |  |  |  | {prompts * 1.8 / 60:.0f} |" in text
    assert "| answering | 2 | 1.800 | 10,256 | 307.7 | 1 |" in text


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
    assert found["models"]["8B"].keys() == {"tokens", "training", "together", "decoding", "calibration", "solving"}
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
    # generate_batch lays its cache out over all main memory.
    works = [work for work in checks.RUNS if work != "answers, continuous"]
    checks.main([*works, "--device", "cpu", "--shrink", "32", "--results", str(more)])
    runs = json.loads(more.read_text())["checks"]
    tokens = scaling.RECIPE["calibration_tokens"]
    assert [(run["work"], run["tokens"], run["prompts"]) for run in runs] == [
        ("prompts", 4096, 1), ("answers", 4096, 16), ("answers, plain", 4096, 16),
        ("training", 4096, 1), ("training", 4096, 4), ("training", 4096, 8), ("training", 4096, 16),
        ("evaluating", 4096, 8), ("judging", 4096, 8), ("profile", 4096, 8),
        ("quantizing", tokens, 1), ("experts", tokens // 4, 1), ("refining", tokens // 4, 1),
        ("tuning", tokens // 4, 1), ("refined", tokens, 1), ("sharing out", 4096, 1),
    ]  # fmt: skip
    assert all(run["seconds"] > 0 for run in runs)
    results = {"models": {"8B": figures() | {"tokens": 4096}}, "links": {scaling.BETWEEN_GPUS: 123.0}}
    file.write_text(json.dumps(results))
    for _ in range(2):  # A run that is made again takes the place of the first.
        scaling.main(["report", "--results", str(file), "--page", str(page), "--merge", str(more)])
    found = scaling.merged(json.loads(file.read_text()), [])
    assert found["checks"] == runs
    predicted = {(run["work"], run["prompts"]): scaling.predicted(run, found) for run in runs}
    assert {key: value for key, value in predicted.items() if value is not None} == {
        ("training", 1): pytest.approx((32.0, 2 * scaling.parameters(scaling.MODELS["8B"]) + 2e9)),
        ("quantizing", 1): pytest.approx((2 * (tokens * 1e-4 + 11), 6e9)),
    }
    text = page.read_text()
    assert "| a training step: 32 layers of the 8B model, 4,096 tokens | 1 GPU |" in text
    assert "| a training step: 32 layers of the 8B model, 4 prompts of 4,096 tokens | 1 GPU |" in text
    assert "### An 8B adapter on one GPU" in text and text.count("building prompts") == 1
    assert "| 123.0 (measured) |" in text


def test_every_run_names_its_own_gpu(tmp_path):
    results = {"models": {"8B": figures() | {"tokens": 4096}}, "hardware": {"gpu": "NVIDIA A", "versions": {}}}
    tokens = scaling.RECIPE["calibration_tokens"]
    runs = [run_of("quantizing", 3.0, 1, layers=2, tokens=tokens, gpus=gpus) for gpus in (1, 2)]
    for run, gpu in zip(runs, "AB", strict=True):
        more = {"hardware": {"gpu": f"NVIDIA {gpu}"}, "checks": [run]}
        (tmp_path / gpu).write_text(json.dumps(more))
    found = scaling.merged(results, [tmp_path / "A", tmp_path / "B"])
    assert found["hardware"] == results["hardware"]
    text = scaling.tables(found)
    assert "| 1 A | 3.00 | 74.43 |" in text and "| 2 B (one GPU) | 3.00 |  |" in text  # computed for its own kind only


def test_a_model_cut_among_gpus_is_one_layer_in_memory_before():
    sizes = scaling.sizes_of("8B", 32)
    model = checks._build_repeated(sizes, 5, "cpu", 32)
    places = {layer.mlp.up_proj.weight.data_ptr() for layer in model.model.layers}
    assert len(places) == 1 and len({id(layer.mlp.up_proj.weight) for layer in model.model.layers}) == 5
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_the_page_is_what_the_results_say():
    results = json.loads(scaling.RESULTS.read_text()) if scaling.RESULTS.exists() else {"models": {}}
    assert scaling.generated(results) in scaling.PAGE.read_text(encoding="utf-8")
