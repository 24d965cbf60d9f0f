"""What training an adapter and quantizing cost on 1 to 64 GPUs, from figures measured on one.

    python benchmarks/scaling.py measure                 # on one CUDA GPU, some minutes
    python benchmarks/scaling.py measure --model 70B     # one of the models again
    python benchmarks/scaling.py report                  # writes the tables of docs/scaling.md

`measure` builds one and three decoder layers of each model, with random weights in bfloat16, and times a training
step of one prompt and of several, the answers to a batch, and the parts of a calibration walk. Half the difference is
one layer, and times the number of layers the model. Models that one GPU cannot hold are thus measured at their own
layers' sizes, not extrapolated from smaller ones. What does not fit even so is written down as null, and its cells say
so.

`report` adds what one GPU cannot show, the exchange between GPUs, from bandwidths that scaling_checks.py measured on
several GPUs, or that are assumed (`ASSUMED`), and sets that script's runs beside what is computed for them. From those
runs it also sums the stages of an 8B adapter. Each run writes a file of its own (`--results`), which `report --merge`
puts together.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import describe, save, seconds_of, synchronize
from peft import get_peft_model
from tables import machine, table
from transformers import AutoModelForCausalLM, LlamaConfig

from lkq_hf import (
    LookaheadCache,
    LookaheadKVConfig,
    LookaheadTrainer,
    LookaheadTrainingArguments,
    prepare_model_for_eviction,
)
from lkq_hf.cli.target_options import TargetOptions
from lkq_hf.cli.train_options import TrainOptions
from lkq_hf.quantization import TwoStageGPTQConfig
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.solve import quantize_weight
from lkq_hf.quantization.walk import quantize_blocks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python benchmarks/scaling.py report -->", "<!-- end of tables -->"
GIB = 2**30

# Sizes of Llama 3.1.
MODELS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_hidden_layers": 126},
}
COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
GPUS = (1, 2, 4, 8, 16, 32, 64)

RECIPE = {
    "prompts": 10_000,
    "prompt_tokens": 4096,
    "response_tokens": 128,
    "prompts_in_a_step": 64,
    "calibration_tokens": 128 * 2048,
}
BETWEEN_GPUS = "bandwidth between the GPUs of a host, GB/s in each direction"
BETWEEN_HOSTS = "bandwidth between hosts, GB/s in each direction and GPU"
ASSUMED = {
    "GPU memory, GiB": 79,
    "GPUs in a host": 8,
    BETWEEN_GPUS: 300,
    BETWEEN_HOSTS: 50,
    "bandwidth from main memory or disk to a GPU, GB/s": 10,
}
TOGETHER = 8
"""Prompts of a training step that are measured in one forward, beside one alone."""
ANSWERED = 16
"""Prompts that are answered together."""
WORK = {
    "prompts": "building prompts, one CPU core",
    "answers": "answering",
    "answers, plain": "answering by `generate` alone",
    "answers, continuous": "answering by `generate_batch`",
    "training": "a training step",
    "evaluating": "evaluating: loss and recall",
    "judging": "judging evicted answers",
    "profile": "measuring the profile",
    "quantizing": "quantizing",
    "experts": "quantizing experts",
    "refining": "quantizing and refining",
    "tuning": "a step of tuning all scales",
    "refined": "quantizing by the refined preset",
    "gathering": "gathering the scores of a prompt",
    "sharing out": "sharing a budget out by the scores of a prompt",
}
"""What `scaling_checks.py` runs, and what it is called in the tables."""


def layer_parameters(sizes: dict[str, int]) -> int:
    hidden, heads = sizes["hidden_size"], COMMON["num_key_value_heads"] * COMMON["head_dim"]
    attention = 2 * hidden * sizes["num_attention_heads"] * COMMON["head_dim"] + 2 * hidden * heads
    return attention + 3 * hidden * sizes["intermediate_size"] + 2 * hidden


def parameters(sizes: dict[str, int]) -> int:
    return sizes["num_hidden_layers"] * layer_parameters(sizes) + 2 * COMMON["vocab_size"] * sizes["hidden_size"]


# Measuring


def sizes_of(name: str, shrink: int) -> dict[str, int]:
    sizes = {key: value // shrink for key, value in MODELS[name].items() if key.endswith("_size")}
    return sizes | {"num_attention_heads": MODELS[name]["num_attention_heads"] // min(shrink, 4)}


def measure(name: str, device: str, shrink: int, save: Callable[[dict[str, Any]], None]) -> None:
    """Gives `save` the figures after each part, so that a run that is cut short leaves what it has."""
    sizes = sizes_of(name, shrink)
    tokens = RECIPE["prompt_tokens"] // shrink
    figures: dict[str, Any] = {"tokens": tokens}
    for part, measured in (
        ("solving", lambda: _solving(sizes, device)),  # first: whether the largest model's fits is a question
        ("calibration", lambda: _calibration(sizes, device, shrink)),
        ("training", lambda: _per_layer(lambda layers: _training(sizes, layers, tokens, 1, device, shrink))),
        ("together", lambda: _per_layer(lambda layers: _training(sizes, layers, tokens, TOGETHER, device, shrink))),
        ("decoding", lambda: _per_layer(lambda layers: _decoding(sizes, layers, tokens, device, shrink))),
    ):
        start = time.perf_counter()
        try:
            figures[part] = measured()
        except torch.cuda.OutOfMemoryError:
            figures[part] = None
        collect(device)
        print(f"{name}, {part}: {figures[part]} ({time.perf_counter() - start:.0f} s)", flush=True)
        save(figures)


def build(sizes: dict[str, int], layers: int, device: str, shrink: int) -> Any:
    changes = {"num_hidden_layers": layers, "vocab_size": COMMON["vocab_size"] // shrink}
    changes["head_dim"] = COMMON["head_dim"] // min(shrink, 8)
    config = LlamaConfig(**{**COMMON, **sizes, **changes})
    config._name_or_path = "random"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _per_layer(run: Callable[[int], dict[str, float]]) -> dict[str, dict[str, float]]:
    """What one layer adds, and what is there without any, of two runs with one and with three layers."""
    one, three = run(1), run(3)
    return {key: {"layer": (three[key] - one[key]) / 2, "rest": (3 * one[key] - three[key]) / 2} for key in one}


def median_seconds(operation: Callable[[], Any], repeats: int = 3) -> float:
    """Median over runs after one that compiles and allocates."""
    return statistics.median(seconds_of(operation, repeats)[0])


def collect(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0


def _training(
    sizes: dict[str, int], layers: int, tokens: int, prompts: int, device: str, shrink: int
) -> dict[str, float]:
    """A training step of some prompts in one forward: seconds and peak bytes, weights and optimizer included."""
    collect(device)
    model = get_peft_model(build(sizes, layers, device, shrink), LookaheadKVConfig())
    row = row_of(tokens, shrink)
    with tempfile.TemporaryDirectory() as directory:
        arguments = LookaheadTrainingArguments(
            output_dir=directory, report_to=[], use_cpu=device == "cpu", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = LookaheadTrainer(model, arguments, train_dataset=[row])
        trainer.create_optimizer()
        inputs = {key: value.to(device) for key, value in trainer.data_collator([row] * prompts).items()}

        def step() -> None:
            trainer.compute_loss(trainer.model, inputs).backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        return {"seconds": median_seconds(step), "bytes": peak(device)}


def row_of(tokens: int, shrink: int) -> dict[str, list[int]]:
    return {
        "input_ids": torch.randint(3, 1000 // shrink, (tokens,)).tolist(),
        "response_ids": [3] * RECIPE["response_tokens"],
    }


def _decoding(sizes: dict[str, int], layers: int, tokens: int, device: str, shrink: int) -> dict[str, float]:
    """Seconds of one prompt in a batch, as `generate_targets` answers it: reading, and one token of its answer."""
    collect(device)
    model = build(sizes, layers, device, shrink)
    prepare_model_for_eviction(model)
    ids = torch.randint(3, 1000 // shrink, (ANSWERED, tokens), device=device)
    more = RECIPE["response_tokens"] // shrink

    def answer(count: int) -> None:
        cache = LookaheadCache(1.0, "streaming", max_new_tokens=more)
        model.generate(ids, max_new_tokens=count, do_sample=False, past_key_values=cache)

    with torch.no_grad():
        one, all_ = (median_seconds(lambda count=count: answer(count), 2) for count in (1, more))  # type: ignore[misc]
    return {"prompt": one / ANSWERED, "token": (all_ - one) / (more - 1) / ANSWERED}


def _calibration(sizes: dict[str, int], device: str, shrink: int) -> dict[str, float]:
    """Seconds of a walk that only rounds: what a calibration token costs in a layer, its passes and moments, and what
    a layer costs besides, `block`: its checksums, copies and packing, and the rounding, which is not worth a solve."""
    switches = {"round_to_nearest": True, "stages": (), "column_order": "stored"}
    config = TwoStageGPTQConfig(group_size=32, advanced=switches)
    length = 2048 // shrink

    def walk(windows: int) -> float:
        collect(device)
        model = build(sizes, 2, device, shrink)
        name, layers = find_layers(model, config)
        tokens = torch.randint(3, 1000 // shrink, (windows, length))
        return quantize_blocks(
            model, name, layers, tokens, config.solver_settings(), device=device, batch_size=2
        ).seconds

    walk(2)
    few, many = walk(2), walk(10)
    token = max(many - few, 0.0) / (8 * length) / 2
    return {"seconds": token, "block": max(few / 2 - 2 * length * token, 0.0), "bytes": peak(device)}


def _solving(sizes: dict[str, int], device: str) -> dict[str, float]:
    """Seconds of one layer's solves: `rows`, what rows take and processes share, and `rest`, what each must do."""
    hidden, middle = sizes["hidden_size"], sizes["intermediate_size"]
    settings = TwoStageGPTQConfig(group_size=128 if middle % 128 == 0 else 32).solver_settings()
    shapes = ((hidden + 2 * hidden // 8, hidden), (hidden, hidden), (2 * middle, hidden), (hidden, middle))
    seconds = {"rows": 0.0, "rest": 0.0}
    collect(device)
    for rows, columns in reversed(shapes):  # The largest first: whether it fits is soon known.
        moments = random_moments(columns, device)
        weight = torch.randn(rows // 2, columns, device=device, dtype=torch.bfloat16) * 0.02
        quantize_weight(weight[:128], moments, settings)  # compiles

        def solve(weight: torch.Tensor = weight, moments: InputMoments = moments) -> float:
            synchronize()
            start = time.perf_counter()
            quantize_weight(weight, moments, settings)
            synchronize()
            return time.perf_counter() - start

        half = solve()
        quarter = solve(weight[: rows // 4])
        seconds["rows"] += 4 * max(half - quarter, 0.0)
        seconds["rest"] += max(2 * quarter - half, 0.0)
        del moments, weight
    return {**seconds, "bytes": peak(device)}


def random_moments(columns: int, device: str) -> InputMoments:
    """Moments of a few tokens: damped, as they are before every step, they are as good to factorize as any."""
    moments = InputMoments(columns, device)
    x = torch.randn(min(columns, 4096), columns, device=device)
    moments.add(x, x + 0.1 * torch.randn_like(x))
    return moments


# The model


@dataclass(frozen=True)
class Cost:
    """Of a piece of work on `gpus`: hours, and GiB of each GPU; `plan` says how the model lies on them."""

    hours: float
    gib: float
    plan: str


def bandwidth(gpus: int, links: dict[str, float]) -> float:
    """Bytes a second between the GPUs, in each direction; the slowest link counts."""
    known = ASSUMED | links
    return 1e9 * known[BETWEEN_GPUS if gpus <= known["GPUs in a host"] else BETWEEN_HOSTS]


def _whole(part: dict[str, float], layers: int) -> float:
    return layers * part["layer"] + part["rest"]


def forward_cost(
    sizes: dict[str, int], figures: dict[str, Any], prompts: int, gpus: int, sharded: bool, links: dict[str, float]
) -> tuple[float, float]:
    """Seconds of a training step of so many prompts on each of the GPUs, and the bytes that each of them holds."""
    layers = sizes["num_hidden_layers"]
    weights = 2 * parameters(sizes)
    one = figures["training"]
    more = figures["together"] if prompts > 1 else one
    seconds, held = (
        _whole(one[what], layers)
        + (prompts - 1) / (TOGETHER - 1) * (_whole(more[what], layers) - _whole(one[what], layers))
        for what in ("seconds", "bytes")
    )
    if sharded:
        # Three passes and a backward one gather every layer.
        seconds += 4 * weights * (gpus - 1) / gpus / bandwidth(gpus, links)
        # One layer is gathered while the next one is on its way: two are whole, and so is the head.
        gathered = 2 * layer_parameters(sizes) + COMMON["vocab_size"] * sizes["hidden_size"]
        held += weights / gpus - weights + 2 * gathered
    return seconds, held


def training_cost(name: str, figures: dict[str, Any], gpus: int, links: dict[str, float] | None = None) -> Cost | str:
    """Generating the targets and training on them, or why there is no figure."""
    if missing := _missing(figures, "training", "decoding"):
        return missing
    sizes, memory, links = MODELS[name], ASSUMED["GPU memory, GiB"] * GIB, links or {}
    layers = sizes["num_hidden_layers"]
    decoding = figures["decoding"]
    steps = math.ceil(RECIPE["prompts"] / RECIPE["prompts_in_a_step"])
    prompts = math.ceil(RECIPE["prompts_in_a_step"] / gpus)
    # A replica answers prompts; without room on one GPU it lies on several, of which one works at a time.
    gpus_of_replica = math.ceil(2 * parameters(sizes) / (0.9 * memory))
    replicas = gpus // gpus_of_replica
    if replicas == 0:
        return "does not fit"
    answer = _whole(decoding["prompt"], layers) + RECIPE["response_tokens"] * _whole(decoding["token"], layers)
    targets = RECIPE["prompts"] / replicas * answer
    numbers = [number for number in (8, 4, 2, 1) if number <= prompts and (number == 1 or figures.get("together"))]
    for sharded, number in itertools.product((False, True) if gpus > 1 else (False,), numbers):
        seconds, held = forward_cost(sizes, figures, number, gpus, sharded, links)
        if held < 0.95 * memory:
            plan = "FSDP2" if sharded else "DDP" if gpus > 1 else "one GPU"
            return Cost((targets + steps * math.ceil(prompts / number) * seconds) / 3600, held / GIB, plan)
    return "does not fit"


def layer_cost(
    sizes: dict[str, int], figures: dict[str, Any], gpus: int, links: dict[str, float], loaded: bool = True
) -> float:
    """Seconds of quantizing one layer on the recipe's calibration tokens; `loaded`: from main memory or disk."""
    solving = figures["solving"]
    passes = RECIPE["calibration_tokens"] / gpus * figures["calibration"]["seconds"]
    rate = 1e9 * ASSUMED["bandwidth from main memory or disk to a GPU, GB/s"]
    loading = 2 * layer_parameters(sizes) / rate if loaded else 0.0
    hidden, middle = sizes["hidden_size"], sizes["intermediate_size"]
    moments = 2 * 4 * (3 * hidden**2 + middle**2)
    exchange = 2 * moments * (gpus - 1) / gpus / bandwidth(gpus, links) if gpus > 1 else 0.0
    alone = figures["calibration"]["block"] + solving["rest"] + loading
    return passes + solving["rows"] / gpus + alone + exchange


def quantization_cost(
    name: str, figures: dict[str, Any], gpus: int, links: dict[str, float] | None = None
) -> Cost | str:
    """The default method over the recipe's calibration tokens, or why there is no figure."""
    if missing := _missing(figures, "calibration", "solving"):
        return missing
    sizes = MODELS[name]
    seconds = sizes["num_hidden_layers"] * layer_cost(sizes, figures, gpus, links or {})
    peak = max(figures["calibration"]["bytes"], figures["solving"]["bytes"])
    return Cost(seconds / 3600, peak / GIB, "by rows" if gpus > 1 else "one GPU")


def _missing(figures: dict[str, Any], *parts: str) -> str | None:
    """Why there is no figure, if so."""
    if any(part not in figures for part in parts):
        return "not measured"
    return "does not fit" if any(figures[part] is None for part in parts) else None


def predicted(run: dict[str, Any], results: dict[str, Any]) -> tuple[float, float] | None:
    """Seconds and bytes that the model gives for a run; None where it was measured for other prompts or GPUs."""
    figures, links = results["models"].get(run["model"], {}), results.get("links", {})
    prompts = run.get("prompts", 1)
    if run["work"] not in ("training", "quantizing") or run["model"] not in MODELS:
        return None
    if run.get("gpu") != results.get("hardware", {}).get("gpu"):
        return None
    training = ("training", "together") if prompts > 1 else ("training",)
    parts = training if run["work"] == "training" else ("calibration", "solving")
    if _missing(figures, *parts) or (run["work"] == "training" and run["tokens"] != figures["tokens"]):
        return None
    sizes = MODELS[run["model"]] | {"num_hidden_layers": run["layers"]}
    if run["work"] == "training":
        return forward_cost(sizes, figures, prompts, run["gpus"], run["plan"] == "FSDP2", links)
    seconds = run["layers"] * layer_cost(sizes, figures, run["gpus"], links, loaded=False)
    return seconds, max(figures["calibration"]["bytes"], figures["solving"]["bytes"])


def tables(results: dict[str, Any]) -> str:
    if not results["models"]:
        return NOT_MEASURED
    parts = []
    links = results.get("links", {})
    for title, cost in (("An adapter", training_cost), ("A quantized checkpoint", quantization_cost)):
        rows = [
            [str(gpus), *(_cell(cost(name, results["models"].get(name, {}), gpus, links)) for name in MODELS)]
            for gpus in GPUS
        ]
        parts += [f"### {title}", table(["GPUs", *MODELS], rows)]
    parts[2:2] = _stages(results)
    hardware = results.get("hardware") or {"versions": {}}
    measured = f"What one GPU takes is measured on: {machine(hardware)}."
    if older := [name for name, figures in results["models"].items() if "together" not in figures]:
        measured += f" Adapters of {', '.join(older)}: {OLDER}."
    if results.get("shrink", 1) != 1:
        measured += f" **A check of the script, with models shrunk by {results['shrink']}: the figures mean nothing.**"
    return "\n\n".join([measured, *parts, *_checks(results)])


def _stages(results: dict[str, Any]) -> list[str]:
    """What one GPU takes from documents to an 8B adapter, stage by stage, each with its fastest number of prompts."""
    training, answered = RECIPE["prompts"], RECIPE["prompts"] + TargetOptions.validation_count
    # Every so many steps, after the last one, and once more with the best weights.
    evaluations = math.ceil(math.ceil(training / RECIPE["prompts_in_a_step"]) / TrainOptions.eval_steps) + 1
    counts = {
        "prompts": answered,
        "answers": answered,
        "training": training,
        "evaluating": TargetOptions.validation_count * evaluations,
        "judging": TrainOptions.judge_prompts * evaluations,
        "profile": TrainOptions.profile_prompts,
    }
    rows, hours, gpus = [], 0.0, set()
    for work, count in counts.items():
        runs = [run for run in results.get("checks", []) if (run["work"], run["gpus"]) == (work, 1)]
        runs = [run for run in runs if run["tokens"] == RECIPE["prompt_tokens"] and run["plan"] == "one GPU"]
        if not runs:
            return []
        best = min(runs, key=lambda run: run["seconds"] / run["prompts"])
        each = best["seconds"] / best["prompts"]
        hours += count * each / 3600
        if work != "prompts":  # built without one
            gpus.add(_gpu(best))
        size = f"{best['bytes'] / GIB:.0f}" if best["bytes"] else ""
        rows.append([WORK[work], str(best["prompts"]), f"{each:.3f}", f"{count:,}", f"{count * each / 60:.1f}", size])
    header = ["stage", "prompts together", "seconds a prompt", "prompts", "minutes", "GiB"]
    rows.append(["all", "", "", "", f"{60 * hours:.0f}", ""])
    return [f"### An 8B adapter on one {' and '.join(sorted(gpus))}, from documents to its files", table(header, rows)]


def _checks(results: dict[str, Any]) -> list[str]:
    rows = []
    for run in results.get("checks", []):
        if run["work"] == "prompts":
            continue  # without a model
        layers = f"{run['layers']} layers" if run["layers"] > 1 else "one layer"
        prompts = f"{run['prompts']:,} prompts of " if run.get("prompts", 1) > 1 else ""
        what = f"{layers} of the {run['model']} model, {prompts}{run['tokens']:,} tokens"
        found = predicted(run, results)
        seconds, size = ("", "") if found is None else (f"{found[0]:.2f}", f"{found[1] / GIB:.1f}")
        gpus = f"{run['gpus']} {_gpu(run)}" + (f" ({run['plan']})" if run["gpus"] > 1 else "")
        digits = 2 if run["seconds"] > 0.1 else 4
        measured = f"{run['seconds']:.{digits}f}", f"{run['bytes'] / GIB:.1f}"
        rows.append([f"{WORK[run['work']]}: {what}", gpus, measured[0], seconds, measured[1], size])
    header = ["run", "GPUs", "seconds", "computed", "GiB of each GPU", "computed"]
    return ["### Runs of whole models, and what is computed for them", table(header, rows)] if rows else []


def _gpu(run: dict[str, Any]) -> str:
    return run.get("gpu", "GPU").removeprefix("NVIDIA ")


OLDER = (
    "by an older version, which decoded answers without the loop, trained on one prompt at a time, and left the "
    "eviction objective out"
)
NOT_MEASURED = (
    "**Not measured yet**: there are no tables until `python benchmarks/scaling.py measure` has run on one GPU and "
    "`python benchmarks/scaling.py report` after it."
)


def _cell(cost: Cost | str) -> str:
    if isinstance(cost, str):
        return cost
    time = f"{cost.hours:.1f} h" if cost.hours >= 1 else f"{60 * cost.hours:.0f} min"
    return f"{time}, {cost.gib:.0f} GiB ({cost.plan})"


def assumptions(links: dict[str, float]) -> str:
    found = {**RECIPE, **ASSUMED, **links}
    rows = [
        [name.replace("_", " "), f"{value:,}{' (measured)' if name in links else ''}"] for name, value in found.items()
    ]
    return table(["assumed", ""], rows)


def generated(results: dict[str, Any]) -> str:
    """The part of docs/scaling.md between the markers."""
    return f"{tables(results)}\n\n{assumptions(results.get('links', {}))}"


def write_page(results: dict[str, Any], page: Path = PAGE) -> None:
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{generated(results)}\n\n{END}{after}", encoding="utf-8")


def merged(results: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    """Results with those of other files. `hardware` is that of the models' figures; every run names its own GPU."""
    results = {"models": {}, "links": {}, "checks": []} | results
    for file in files:
        more = json.loads(file.read_text())
        if more.get("models") or "hardware" not in results:
            results |= {key: value for key, value in more.items() if key in ("hardware", "shrink")}
        results["models"] |= more.get("models", {})
        results["links"] |= more.get("links", {})
        hardware = more.get("hardware", {})
        gpu = {"gpu": hardware["gpu"]} if "gpu" in hardware else {}  # prompts are built without
        results["checks"] = _newest([*results["checks"], *(gpu | run for run in more.get("checks", []))])
    return results


def _newest(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of each run that was made more than once."""
    return list(
        {
            tuple(run.get(key, 1) for key in ("work", "model", "layers", "tokens", "prompts", "plan", "gpus")): run
            for run in runs
        }.values()
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "report"])
    parser.add_argument("--model", choices=list(MODELS), action="append", help="repeatable; all by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides all sizes: a quick check without a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="files of other runs (report)")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text()) if options.results.exists() else {"models": {}}
    results = merged(results, options.merge)

    def write() -> None:
        save(options.results, results)

    def save_figures(name: str, figures: dict[str, Any]) -> None:
        results["models"][name] = figures
        write()

    if options.command == "report":
        if options.merge:
            write()
        write_page(results, options.page)
        return
    results |= {"hardware": describe(), "shrink": options.shrink}
    for name in options.model or MODELS:
        measure(name, options.device, options.shrink, functools.partial(save_figures, name))


if __name__ == "__main__":
    main()
