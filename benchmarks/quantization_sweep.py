"""Measures many quantization settings side by side on one GPU, ours and AutoRound's, and writes a row for each.

    python benchmarks/quantization_sweep.py prepare --model smollm2 --calibration python3.11-doc.jsonl.gz \
        --texts debian-handbook.jsonl.gz anarchism.jsonl.gz --out windows.safetensors
    python benchmarks/quantization_sweep.py run experiments.jsonl --model smollm2 --windows windows.safetensors \
        --device cuda --processes 6 --minutes 9 --out rows.jsonl

`prepare` writes the windows of tokens, so that `run` needs neither texts nor a tokenizer of a certain version. A line
of the experiments is an object. What it leaves out is as in `Experiment`:

    {"bits": 2, "sym": true, "refinement": {"steps": 400}, "end_to_end": {"steps": 100}}
    {"bits": 2, "samples": 32, "length": 512, "peer": {"iters": 1000, "enable_alg_ext": true}}

`peer` runs AutoRound (0.16.1: auto-round and py-cpuinfo besides what is here) with these arguments. The processes take
the experiments in the order of the file. A row holds the experiment, each window's loss over full precision, the
divergence from it (mean and 99th percentile over tokens, in nats), the share of tokens whose most likely successor is
the same, and the seconds. The same command continues a stopped run: experiments that have a row are passed over.
"""

import argparse
import copy
import fcntl
import json
import math
import statistics
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import describe
from quantization import load, statistics_of
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.calibration_data import calibration_tokens
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.quantizer import restore_linear
from lkq_hf.quantization.refinement import BlockRefinement, EndToEnd
from lkq_hf.quantization.walk import quantize_blocks

CALIBRATIONS = ((32, 512), (128, 2048))


@dataclass(frozen=True)
class Experiment:
    """One setting: `config` are arguments of `TwoStageGPTQConfig`, `peer` those of AutoRound instead."""

    name: str = ""
    bits: int = 2
    sym: bool = False
    group_size: int = 64
    samples: int = 128
    length: int = 2048
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] | None = None
    end_to_end: dict[str, Any] | None = None
    peer: dict[str, Any] | None = None


def prepare(arguments: argparse.Namespace) -> None:
    _, tokenizer = load(arguments.model)
    tensors = {}
    for samples, length in CALIBRATIONS:
        for seed in arguments.seeds:
            tokens, _ = calibration_tokens(arguments.calibration, tokenizer, samples, length, seed)
            tensors[f"calibration.{samples}x{length}.{seed}"] = tokens.int()
    for path in arguments.texts:
        tokens, _ = calibration_tokens(path, tokenizer, arguments.test_windows, 1024, seed=1234)
        tensors[f"text.{path.name.split('.')[0]}"] = tokens.int()
    save_file(tensors, arguments.out)


def shortened(model: PreTrainedModel, blocks: int | None) -> PreTrainedModel:
    """The model with its first blocks alone, to try things out."""
    if blocks is not None:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:blocks]
    return model


def ours(model: PreTrainedModel, experiment: Experiment, tokens: Tensor) -> tuple[PreTrainedModel, dict[str, Any]]:
    model = copy.deepcopy(model)
    config = TwoStageGPTQConfig.from_dict(
        {"bits": experiment.bits, "sym": experiment.sym, "group_size": experiment.group_size, **experiment.config}
    )
    settings = replace(
        config.solver_settings(),
        refinement=None if experiment.refinement is None else BlockRefinement(**experiment.refinement),
        end_to_end=None if experiment.end_to_end is None else EndToEnd(**experiment.end_to_end),
    )
    name, layers = find_layers(model, config)
    report = quantize_blocks(model, name, layers, tokens, settings, device=model.device, batch_size=config.batch_size)
    details: dict[str, Any] = {"walk_seconds": round(report.seconds, 1), "peak_memory": report.peak_memory}
    if report.blocks:
        details["blocks"] = [[round(block.before, 6), round(block.after, 6)] for block in report.blocks]
    if report.end_to_end is not None:
        details["end_to_end_divergence"] = [report.end_to_end.before, report.end_to_end.after]
    return restore_linear(model, model.dtype), details


def autoround(
    model: PreTrainedModel, experiment: Experiment, tokens: Tensor, tokenizer: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    import auto_round

    model = copy.deepcopy(model).cpu()
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.cpu()]
    result = auto_round.AutoRound(
        copy.deepcopy(model),
        tokenizer,
        bits=experiment.bits,
        group_size=experiment.group_size,
        sym=experiment.sym,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=DataLoader(rows, batch_size=8),
        seed=experiment.seed,
        device_map=0 if torch.cuda.is_available() else "cpu",
        **(experiment.peer or {}),
    ).quantize()
    changed = 0
    for name, module in result[0].named_modules():
        if isinstance(module, nn.Linear) and getattr(module, "scale", None) is not None:
            # The peer keeps the product in half precision: the levels and scales it stores are exact.
            weight = module.weight.detach().float().cpu()
            scales = module.scale.detach().float().cpu().view(len(weight), -1, 1)
            levels = (weight.view(len(weight), scales.shape[1], -1) / scales).round()
            with torch.no_grad():
                model.get_submodule(name).weight.copy_((levels * scales).view_as(weight))
            changed += 1
    return model, {"peer_version": auto_round.__version__, "layers": changed}


def measure(model: PreTrainedModel, original: PreTrainedModel, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Losses over full precision by window, and how the two models' predictions differ by token."""
    increase: dict[str, list[float]] = {}
    divergences, equal = [], []
    size = 4 if model.device.type == "cuda" else 1
    for name, windows in texts.items():
        found = statistics_of(model, windows.long(), size, original)
        base = statistics_of(original, windows.long(), size)["nll"]
        pairs = zip(found["nll"], base, strict=True)
        increase[name] = [round(statistics.fmean(own) - statistics.fmean(full), 5) for own, full in pairs]
        divergences.append(torch.tensor(found["kl"]).flatten())
        equal.append(torch.tensor(found["same_top"]).flatten())
    divergence = torch.cat(divergences)
    return {
        "mean": {name: round(statistics.fmean(values), 4) for name, values in increase.items()},
        "worst_window": max(max(values) - statistics.fmean(values) for values in increase.values()),
        "divergence": round(float(divergence.mean()), 5),
        "divergence_99": round(float(divergence.quantile(0.99)), 4),
        "same_top": round(float(torch.cat(equal).float().mean()), 4),
        "increase": increase,
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def work(index: int, counter: Any, experiments: list[Experiment], arguments: argparse.Namespace, begin: float) -> None:
    """One process: takes the next experiment until none is left or the time is over."""
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model)
    model = shortened(model, arguments.blocks).to(arguments.device).eval()
    tensors = load_file(arguments.windows)
    texts = {name.removeprefix("text."): t[: arguments.test_windows] for name, t in tensors.items() if "text." in name}
    environment = describe()
    while time.time() - begin < 60 * arguments.minutes:
        with counter.get_lock():
            position = counter.value
            counter.value += 1
        if position >= len(experiments):
            break
        experiment = experiments[position]
        tokens = tensors[f"calibration.{experiment.samples}x{experiment.length}.{experiment.seed}"].long()
        row: dict[str, Any] = {"experiment": asdict(experiment)}
        start = time.perf_counter()
        try:
            if experiment.peer is None:
                approximation, details = ours(model, experiment, tokens[: arguments.samples])
            else:
                approximation, details = autoround(model, experiment, tokens[: arguments.samples], tokenizer)
            row["seconds"] = round(time.perf_counter() - start, 1)
            row |= details | measure(approximation.to(arguments.device), model, texts)
            del approximation
        except Exception:
            # One setting that fails must not end the others, whose device time is paid for.
            row["error"] = traceback.format_exc(limit=4)
        row["environment"] = environment
        append(arguments.out, row)
        shown = {key: row[key] for key in ("mean", "divergence", "worst_window", "seconds", "error") if key in row}
        label = {key: value for key, value in asdict(experiment).items() if value not in (None, "", {})}
        print(json.dumps(label), json.dumps(shown), flush=True)


def run(arguments: argparse.Namespace) -> None:
    experiments = [Experiment(**json.loads(line)) for line in arguments.experiments.read_text().splitlines() if line]
    done = [row["experiment"] for row in rows_of(arguments.out) if "error" not in row]
    waiting = [experiment for experiment in experiments if asdict(experiment) not in done]
    print(f"{len(waiting)} of {len(experiments)} experiments are to be run", flush=True)
    if str(arguments.device).startswith("cuda"):
        torch.set_float32_matmul_precision("highest")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    begin = time.time()
    count = min(arguments.processes, len(waiting))
    processes = [context.Process(target=work, args=(i, counter, waiting, arguments, begin)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("prepare")
    first.add_argument("--model", default="smollm2")
    first.add_argument("--calibration", type=Path, required=True)
    first.add_argument("--texts", type=Path, nargs="+", required=True)
    first.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    first.add_argument("--test-windows", type=int, default=32)
    first.add_argument("--out", type=Path, required=True)
    first.set_defaults(do=prepare)
    second = commands.add_parser("run")
    second.add_argument("experiments", type=Path)
    second.add_argument("--model", default="smollm2", help="smollm2, gemma3, a model directory, or a .gguf file")
    second.add_argument("--windows", type=Path, required=True, help="written by prepare")
    second.add_argument("--device", default="cpu")
    second.add_argument("--processes", type=int, default=1)
    second.add_argument("--threads", type=int, default=1, help="of each process")
    second.add_argument("--minutes", type=float, default=math.inf, help="begin no experiment after these")
    second.add_argument("--blocks", type=int, help="only the model's first blocks, to try things out")
    second.add_argument("--samples", type=int, help="at most so many calibration windows, likewise")
    second.add_argument("--test-windows", type=int, help="at most so many windows of each text, likewise")
    second.add_argument("--out", type=Path, required=True)
    second.set_defaults(do=run)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
