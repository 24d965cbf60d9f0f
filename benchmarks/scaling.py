"""What training an adapter and quantising cost on 1 to 64 GPUs, from figures measured on one.

    python benchmarks/scaling.py measure                 # on one CUDA GPU, about three minutes
    python benchmarks/scaling.py report                  # writes the tables of docs/scaling.md
    python benchmarks/scaling.py measure --model 70B     # one of the models again

`measure` builds one and three decoder layers of each model, with random weights in bfloat16, and times a training
step, decoding, and the parts of a calibration walk. Half the difference is one layer, and times the number of layers
the model. Models that one GPU cannot hold are thus measured at their own layers' sizes, not extrapolated from smaller
ones. What does not fit even so is written down as null, and its cells say that they were not measured.

`report` adds what one GPU cannot show, the exchange between GPUs, from bandwidths that are assumed (`ASSUMED`).
"""

import argparse
import gc
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
from hardware import describe
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from lkq_hf import LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments
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
ASSUMED = {
    "GPU memory, GiB": 139,
    "GPUs in a host": 8,
    "bandwidth between the GPUs of a host, GB/s in each direction": 450,
    "bandwidth between hosts, GB/s in each direction and GPU": 50,
    "bandwidth from main memory or disk to a GPU, GB/s": 10,
}


def layer_parameters(sizes: dict[str, int]) -> int:
    hidden, heads = sizes["hidden_size"], COMMON["num_key_value_heads"] * COMMON["head_dim"]
    attention = 2 * hidden * sizes["num_attention_heads"] * COMMON["head_dim"] + 2 * hidden * heads
    return attention + 3 * hidden * sizes["intermediate_size"] + 2 * hidden


def parameters(sizes: dict[str, int]) -> int:
    return sizes["num_hidden_layers"] * layer_parameters(sizes) + 2 * COMMON["vocab_size"] * sizes["hidden_size"]


# Measuring


def measure(name: str, device: str, shrink: int) -> dict[str, Any]:
    sizes = {key: value // shrink for key, value in MODELS[name].items() if key.endswith("_size")}
    sizes["num_attention_heads"] = MODELS[name]["num_attention_heads"] // min(shrink, 4)
    tokens = RECIPE["prompt_tokens"] // shrink
    figures: dict[str, Any] = {"tokens": tokens}
    for part, measured in (
        ("training", lambda: _per_layer(lambda layers: _training(sizes, layers, tokens, device, shrink))),
        ("decoding", lambda: _per_layer(lambda layers: _decoding(sizes, layers, tokens, device, shrink))),
        ("calibration", lambda: _calibration(sizes, device, shrink)),
        ("solving", lambda: _solving(sizes, device)),
    ):
        start = time.perf_counter()
        try:
            figures[part] = measured()
        except torch.cuda.OutOfMemoryError:
            figures[part] = None
        _collect(device)
        print(f"{name}, {part}: {figures[part]} ({time.perf_counter() - start:.0f} s)", flush=True)
    return figures


def _build(sizes: dict[str, int], layers: int, device: str, shrink: int) -> Any:
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


def _seconds(operation: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """Median over runs after one that compiles and allocates."""
    operation()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        operation()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _collect(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0


def _training(sizes: dict[str, int], layers: int, tokens: int, device: str, shrink: int) -> dict[str, float]:
    """One prompt's part of a training step: seconds and peak bytes, weights and optimiser included."""
    _collect(device)
    model = get_peft_model(_build(sizes, layers, device, shrink), LookaheadKVConfig())
    row = {
        "input_ids": torch.randint(3, 1000 // shrink, (tokens,)).tolist(),
        "response_ids": [3] * RECIPE["response_tokens"],
    }
    with tempfile.TemporaryDirectory() as directory:
        arguments = LookaheadTrainingArguments(
            output_dir=directory, report_to=[], use_cpu=device == "cpu", save_strategy="no", disable_tqdm=True
        )
        trainer = LookaheadTrainer(model, arguments, train_dataset=[row])
        trainer.create_optimizer()
        inputs = {key: value.to(device) for key, value in trainer.data_collator([row]).items()}

        def step() -> None:
            trainer.compute_loss(trainer.model, inputs).backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        return {"seconds": _seconds(step, device), "bytes": _peak(device)}


def _decoding(sizes: dict[str, int], layers: int, tokens: int, device: str, shrink: int) -> dict[str, float]:
    """Seconds of one prompt in a batch of 8: reading it, and one token of its answer."""
    _collect(device)
    model = _build(sizes, layers, device, shrink)
    batch, few = 8, 16
    ids = torch.randint(3, 1000 // shrink, (batch, tokens), device=device)
    with torch.no_grad():
        first, more = (
            _seconds(lambda count=count: model.generate(ids, max_new_tokens=count, do_sample=False), device, 2)  # type: ignore[misc]
            for count in (1, 1 + few)
        )
    return {"prompt": first / batch, "token": (more - first) / few / batch}


def _calibration(sizes: dict[str, int], device: str, shrink: int) -> dict[str, float]:
    """Seconds that a calibration token costs in a layer, its passes and moments, by a walk that solves nothing."""
    config = TwoStageGPTQConfig(group_size=32, round_to_nearest=True, stages=(), column_order="stored")
    length = 2048 // shrink

    def walk(windows: int) -> float:
        _collect(device)
        model = _build(sizes, 2, device, shrink)
        name, layers = find_layers(model, config)
        tokens = torch.randint(3, 1000 // shrink, (windows, length))
        return quantize_blocks(
            model, name, layers, tokens, config.solver_settings(), device=device, batch_size=2
        ).seconds

    walk(2)
    few, many = walk(2), walk(10)
    return {"seconds": max(many - few, 0.0) / (8 * length) / 2, "bytes": _peak(device)}


def _solving(sizes: dict[str, int], device: str) -> dict[str, float]:
    """Seconds of one layer's solves: `rows`, what rows take and processes share, and `rest`, what each must do."""
    hidden, middle = sizes["hidden_size"], sizes["intermediate_size"]
    settings = TwoStageGPTQConfig(group_size=128 if middle % 128 == 0 else 32).solver_settings()
    shapes = ((hidden + 2 * hidden // 8, hidden), (hidden, hidden), (2 * middle, hidden), (hidden, middle))
    seconds = {"rows": 0.0, "rest": 0.0}
    _collect(device)
    for rows, columns in shapes:
        moments = _random_moments(columns, device)
        weight = torch.randn(rows // 2, columns, device=device, dtype=torch.bfloat16) * 0.02
        quantize_weight(weight[:128], moments, settings)  # compiles

        def solve(weight: torch.Tensor = weight, moments: InputMoments = moments) -> float:
            _synchronize(device)
            start = time.perf_counter()
            quantize_weight(weight, moments, settings)
            _synchronize(device)
            return time.perf_counter() - start

        half = solve()
        quarter = solve(weight[: rows // 4])
        seconds["rows"] += 4 * max(half - quarter, 0.0)
        seconds["rest"] += max(2 * quarter - half, 0.0)
        del moments, weight
    return {**seconds, "bytes": _peak(device)}


def _random_moments(columns: int, device: str) -> InputMoments:
    """Moments of a few tokens: damped, as they are before every step, they are as good to factorise as any."""
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


def bandwidth(gpus: int) -> float:
    """Bytes a second between the GPUs, in each direction; the slowest link counts."""
    inside = gpus <= ASSUMED["GPUs in a host"]
    between = "bandwidth between the GPUs of a host, GB/s in each direction"
    return 1e9 * ASSUMED[between if inside else "bandwidth between hosts, GB/s in each direction and GPU"]


def training_cost(name: str, figures: dict[str, Any], gpus: int) -> Cost | str:
    """Generating the targets and training on them, or why there is no figure."""
    if figures.get("training") is None or figures.get("decoding") is None:
        return "not measured"
    sizes, memory = MODELS[name], ASSUMED["GPU memory, GiB"] * GIB
    layers = sizes["num_hidden_layers"]

    def whole(part: dict[str, float]) -> float:
        return layers * part["layer"] + part["rest"]

    training, decoding = figures["training"], figures["decoding"]
    weights = 2 * parameters(sizes)
    besides = whole(training["bytes"]) - weights
    steps = math.ceil(RECIPE["prompts"] / RECIPE["prompts_in_a_step"])
    prompts = math.ceil(RECIPE["prompts_in_a_step"] / gpus)
    # A replica answers prompts; without room on one GPU it lies on several, of which one works at a time.
    gpus_of_replica = math.ceil(weights / (0.9 * memory))
    replicas = gpus // gpus_of_replica
    if replicas == 0:
        return "does not fit"
    answer = whole(decoding["prompt"]) + RECIPE["response_tokens"] * whole(decoding["token"])
    targets = RECIPE["prompts"] / replicas * answer
    work = steps * prompts * whole(training["seconds"])
    if weights + besides < 0.95 * memory:
        return Cost((targets + work) / 3600, (weights + besides) / GIB, "DDP" if gpus > 1 else "one GPU")
    # One layer is gathered while the next one is on its way: two are whole.
    held = weights / gpus + besides + 2 * 2 * layer_parameters(sizes)
    if held > 0.95 * memory or gpus == 1:
        return "does not fit"
    # Each prompt is a forward of its own, with three passes and a backward one that gather every layer.
    exchange = steps * prompts * 4 * weights * (gpus - 1) / gpus / bandwidth(gpus)
    return Cost((targets + work + exchange) / 3600, held / GIB, "FSDP2")


def quantization_cost(name: str, figures: dict[str, Any], gpus: int) -> Cost | str:
    """The default method over the recipe's calibration tokens, or why there is no figure."""
    calibration, solving = figures.get("calibration"), figures.get("solving")
    if calibration is None or solving is None:
        return "not measured"
    sizes = MODELS[name]
    passes = RECIPE["calibration_tokens"] / gpus * calibration["seconds"]
    loading = 2 * layer_parameters(sizes) / 1e9 / ASSUMED["bandwidth from main memory or disk to a GPU, GB/s"]
    hidden, middle = sizes["hidden_size"], sizes["intermediate_size"]
    moments = 2 * 4 * (3 * hidden**2 + middle**2)
    exchange = 2 * moments * (gpus - 1) / gpus / bandwidth(gpus) if gpus > 1 else 0.0
    layer = passes + solving["rows"] / gpus + solving["rest"] + loading + exchange
    peak = max(calibration["bytes"], solving["bytes"])
    return Cost(sizes["num_hidden_layers"] * layer / 3600, peak / GIB, "by rows" if gpus > 1 else "one GPU")


def tables(results: dict[str, Any]) -> str:
    if not results["models"]:
        return NOT_MEASURED
    lines = []
    for title, cost in (("An adapter", training_cost), ("A quantised checkpoint", quantization_cost)):
        lines += [f"### {title}", "", "| GPUs | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
        for gpus in GPUS:
            cells = [_cell(cost(name, results["models"].get(name, {}), gpus)) for name in MODELS]
            lines.append(f"| {gpus} | " + " | ".join(cells) + " |")
        lines.append("")
    hardware = results.get("hardware", {})
    versions = ", ".join(f"{package} {version}" for package, version in hardware.get("versions", {}).items())
    measured = f"Measured on: {hardware.get('gpu') or hardware.get('cpu')}; {versions}."
    if results.get("shrink", 1) != 1:
        measured += f" **A check of the script, with models shrunk by {results['shrink']}: the figures mean nothing.**"
    return "\n".join([measured, "", *lines]).rstrip()


NOT_MEASURED = (
    "**Not measured yet**: there are no tables until `python benchmarks/scaling.py measure` has run on one GPU and "
    "`python benchmarks/scaling.py report` after it."
)


def _cell(cost: Cost | str) -> str:
    if isinstance(cost, str):
        return cost
    time = f"{cost.hours:.1f} h" if cost.hours >= 1 else f"{60 * cost.hours:.0f} min"
    return f"{time}, {cost.gib:.0f} GiB ({cost.plan})"


def assumptions() -> str:
    rows = [f"| {name.replace('_', ' ')} | {value:,} |" for name, value in {**RECIPE, **ASSUMED}.items()]
    return "\n".join(["| assumed | |", "|---|---|", *rows])


def generated(results: dict[str, Any]) -> str:
    """The part of docs/scaling.md between the markers."""
    return f"{tables(results)}\n\n{assumptions()}"


def write_page(results: dict[str, Any], page: Path = PAGE) -> None:
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{generated(results)}\n\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "report"])
    parser.add_argument("--model", choices=list(MODELS), action="append", help="repeatable; all by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides all sizes: a quick check without a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text()) if options.results.exists() else {"models": {}}
    if options.command == "measure":
        results |= {"hardware": describe(), "shrink": options.shrink}
        for name in options.model or MODELS:
            results["models"][name] = measure(name, options.device, options.shrink)
            # After each, so that a run that is cut short leaves what it has.
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results, options.page)


if __name__ == "__main__":
    main()
