"""What each quantisation method costs: increase of the negative log-likelihood over full precision, in nats per token.

    python benchmarks/texts.py python3.11-doc_*.deb --out calibration.jsonl.gz
    python benchmarks/texts.py debian-handbook_*.deb --out handbook.jsonl.gz
    python benchmarks/texts.py anarchism_*.deb --out anarchism.jsonl.gz
    python benchmarks/quantization.py --calibration calibration.jsonl.gz --texts handbook.jsonl.gz anarchism.jsonl.gz \
        --bits 4 3 2 --seeds 0 1 --device cuda --out benchmarks/results/quantization_smollm2.json

Every method sees the same calibration tokens and the same windows of text. Results are written after each run, and
runs that are already in the file are not repeated. A markdown table is printed and written beside the JSON file.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from gptq_checkpoint import load_gptq
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lkq_hf
from lkq_hf.evaluation.models import gemma3_directory, smollm2_directory
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.calibration_data import calibration_tokens
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.quantizer import restore_linear
from lkq_hf.quantization.walk import quantize_blocks

PLAIN = {"preset": "paper", "stages": (), "alpha": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "round to nearest": {**PLAIN, "round_to_nearest": True},
    "GPTQ": PLAIN,
    "GPTQ + MSE-searched scales": {**PLAIN, "scale_search": "mse"},
    "stage 1 only": {**PLAIN, "stages": ("stage1",)},
    "stage 2 only, alpha 0": {**PLAIN, "stages": ("stage2",)},
    "both stages, alpha 0": {"preset": "paper", "alpha": 0.0},
    "both stages (paper)": {"preset": "paper"},
    "both stages, alpha 1": {"preset": "paper", "alpha": 1.0},
    "both stages, alpha 0, 3 sweeps": {"preset": "paper", "alpha": 0.0, "sweeps": 3},
    "both stages, alpha 0, group-aware order": {"preset": "paper", "alpha": 0.0, "column_order": "group_aware"},
    "default, alpha 0": {"alpha": 0.0},
    "default": {},
    "default, alpha 0.5": {"alpha": 0.5},
    "default, alpha 1": {"alpha": 1.0},
    "default, 1 sweep": {"sweeps": 1},
    "default, 3 sweeps": {"sweeps": 3},
    "default, 20 sweeps": {"sweeps": 20},
    "default, group-aware order": {"column_order": "group_aware"},
    "default, stored order": {"column_order": "stored"},
    "default, damping 0.01": {"damp_percent": 0.01},
    "default, damping 0.3": {"damp_percent": 0.3},
    "default, stage 2 instead of descent": {"stages": ("stage1", "stage2")},
}
MODELS = {"smollm2": smollm2_directory, "gemma3": gemma3_directory}


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: Tensor, batch_size: int) -> list[float]:
    """Mean negative log-likelihood of each window's later tokens, in nats. `windows`: `[windows, length]`."""
    losses: list[float] = []
    for batch in windows.to(model.device).split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        losses.extend(loss.mean(1).tolist())
    return losses


def quantised(model: PreTrainedModel, config: TwoStageGPTQConfig, tokens: Tensor) -> tuple[PreTrainedModel, Any]:
    """A copy of `model` with dequantised weights in its linear layers, and the report of the walk."""
    model = copy.deepcopy(model)
    list_name, layers = find_layers(model, config)
    report = quantize_blocks(
        model,
        list_name,
        layers,
        tokens,
        config.solver_settings(),
        device=model.device,
        batch_size=config.batch_size,
    )
    return restore_linear(model, model.dtype), report


def environment(device: str) -> dict[str, str]:
    hardware = (
        torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    )
    return {
        "hardware": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lkq_hf": lkq_hf.__version__,
    }


def markdown(results: dict[str, Any]) -> str:
    """A table a zero-point scheme: methods by bit widths, mean increase over texts and seeds and its standard error.

    The standard error is that of the mean over windows of the paired differences; windows of one text are taken as
    independent, calibration seeds are averaged first.
    """
    runs = results["runs"]
    lines = []
    for sym in (False, True):
        chosen = [run for run in runs if run["sym"] == sym]
        if not chosen:
            continue
        bits = sorted({run["bits"] for run in chosen}, reverse=True)
        lines += [f"\n{'Symmetric' if sym else 'Asymmetric'}, group size {results['settings']['group_size']}:\n"]
        lines += ["| method | " + " | ".join(f"{b} bits" for b in bits) + " |", "|---" * (len(bits) + 1) + "|"]
        for method in dict.fromkeys(run["method"] for run in chosen):
            cells = []
            for b in bits:
                same = [run for run in chosen if run["method"] == method and run["bits"] == b]
                cells.append(_cell(results["full_precision"], same) if same else "")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"


def _cell(full: dict[str, list[float]], runs: list[dict[str, Any]]) -> str:
    means, variance = [], 0.0
    for text, base in full.items():
        increases = [statistics.fmean(run["losses"][text][i] - base[i] for run in runs) for i in range(len(base))]
        means.append(statistics.fmean(increases))
        if len(increases) > 1:
            variance += statistics.variance(increases) / len(increases)
    error = math.sqrt(variance) / len(full)
    return f"{statistics.fmean(means):.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3, or a model directory")
    parser.add_argument("--calibration", required=True, type=Path, help="text or jsonl file, may be gzipped")
    parser.add_argument("--texts", required=True, nargs="+", type=Path, help="texts to measure on, likewise")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--schemes", nargs="+", choices=["asym", "sym"], default=["asym"])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1,024 tokens from each text")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--checkpoints", nargs="+", default=[], metavar="NAME=DIR", help="GPTQ checkpoints of other tools"
    )
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()

    directory = MODELS[arguments.model]() if arguments.model in MODELS else Path(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    windows = {
        path.name.split(".")[0]: calibration_tokens(path, tokenizer, arguments.windows, 1024, seed=1234)[0]
        for path in arguments.texts
    }
    settings = {
        "model": directory.name,
        "group_size": arguments.group_size,
        "samples": arguments.samples,
        "length": arguments.length,
        "windows": arguments.windows,
        "dtype": arguments.dtype,
    }
    results: dict[str, Any] = {"settings": settings, "runs": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{arguments.out} holds runs with other settings: {results['settings']}")
    evaluation_batch = 4 if arguments.device.startswith("cuda") else 1
    results["full_precision"] = {name: window_losses(model, w, evaluation_batch) for name, w in windows.items()}
    print("full precision:", {name: round(statistics.fmean(x), 4) for name, x in results["full_precision"].items()})

    done = {(run["method"], run["bits"], run["sym"], run["seed"]) for run in results["runs"]}
    for seed in arguments.seeds:
        tokens, recipe = calibration_tokens(
            arguments.calibration, tokenizer, arguments.samples, arguments.length, seed
        )
        for scheme in arguments.schemes:
            for bits in arguments.bits:
                for method in arguments.methods:
                    if (method, bits, scheme == "sym", seed) in done:
                        continue
                    config = TwoStageGPTQConfig(
                        bits=bits,
                        group_size=arguments.group_size,
                        sym=scheme == "sym",
                        batch_size=arguments.batch_size,
                        **METHODS[method],
                    )
                    start = time.perf_counter()
                    approximation, report = quantised(model, config, tokens)
                    losses = {name: window_losses(approximation, w, evaluation_batch) for name, w in windows.items()}
                    results["runs"].append(
                        {
                            "method": method,
                            "bits": bits,
                            "sym": config.sym,
                            "seed": seed,
                            "calibration": recipe.to_dict(),
                            "losses": losses,
                            "quantisation_seconds": round(report.seconds, 2),
                            "environment": environment(arguments.device),
                        }
                    )
                    arguments.out.parent.mkdir(parents=True, exist_ok=True)
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
                    increase = {
                        name: round(statistics.fmean(x) - statistics.fmean(results["full_precision"][name]), 4)
                        for name, x in losses.items()
                    }
                    seconds = time.perf_counter() - start
                    print(f"{bits} bits {scheme} seed {seed} {method}: {increase} ({seconds:.0f} s)", flush=True)
    for name, _, source in (checkpoint.partition("=") for checkpoint in arguments.checkpoints):
        quantization = json.loads((Path(source) / "config.json").read_text())["quantization_config"]
        if (name, quantization["bits"]) in {(run["method"], run["bits"]) for run in results["runs"]}:
            continue
        other = load_gptq(source, dtype=model.dtype).to(arguments.device).eval()
        results["runs"].append(
            {
                "method": name,
                "bits": quantization["bits"],
                "sym": quantization["sym"],
                "seed": None,
                "losses": {text: window_losses(other, w, evaluation_batch) for text, w in windows.items()},
                "environment": environment(arguments.device),
            }
        )
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    arguments.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
