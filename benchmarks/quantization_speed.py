"""Time to quantize one layer of each shape of Llama-3.1-8B on a GPU, and the whole model's arithmetic from it.

    python benchmarks/quantization_speed.py --bits 4 --group-size 128 --out benchmarks/results/quantization_speed.json

Weights and calibration inputs are random: no step's time depends on their values. Timed are the accumulation of both
moments, GPTQ, the two stages of the paper, and the joint descent of the default method. Layers that share an input
(q, k, v; gate, up) are solved together, as the calibration walk does. Forward passes and loading are not included.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import lkq_hf
from lkq_hf.quantization.descent import joint_descent
from lkq_hf.quantization.gptq import costliest_first_order, gptq
from lkq_hf.quantization.grid import minmax_grid
from lkq_hf.quantization.hessian import InputMoments, damped, inverse_factor
from lkq_hf.quantization.precision import full_float32
from lkq_hf.quantization.solve import corrected_target
from lkq_hf.quantization.stage1 import search_scales
from lkq_hf.quantization.stage2 import refine_scales

BLOCKS = 32
# Layers with one input: name, out_features together, in_features.
SHAPES = (("q, k, v", 6144, 4096), ("o", 4096, 4096), ("gate, up", 28672, 4096), ("down", 4096, 14336))


def timed(operation: Callable[[], Any], device: str, repeats: int) -> tuple[float, Any]:
    """Seconds of the fastest of `repeats` runs after one that compiles and allocates, and the last result."""
    operation()
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        result = operation()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best, result


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_layer(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    device: str,
    batch: int,
    tokens: int,
    sweeps: int,
    repeats: int,
) -> dict[str, float]:
    """Seconds of each step for one layer, `[rows, columns]`."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, device=device) * 0.02
    x = torch.randn(batch, columns, generator=generator, device=device)
    x_tilde = x + 0.1 * torch.randn(batch, columns, generator=generator, device=device)
    # As a model in bfloat16 hands them over.
    x, x_tilde = x.bfloat16(), x_tilde.bfloat16()
    # Twice as many tokens as columns, so that the moments have full rank, whatever the batch.
    moments = InputMoments(columns, device)
    for _ in range(-(-2 * columns // batch)):
        noise = torch.randn(batch, columns, generator=generator, device=device)
        moments.add(noise + 0.1 * x_tilde, noise + 0.1 * x)
    hessian, deviation = moments.hessian, moments.deviation
    seconds = {}
    passes = tokens / batch
    plain = InputMoments(columns, device, deviation=False)
    seconds["hessian"] = timed(lambda: plain.add(x_tilde), device, repeats)[0] * passes
    both = InputMoments(columns, device)
    seconds["deviation"] = timed(lambda: both.add(x_tilde, x), device, repeats)[0] * passes - seconds["hessian"]

    seconds["order"], order = timed(
        lambda: costliest_first_order(inverse_factor(damped(hessian, 0.01))), device, repeats
    )
    grid = minmax_grid(weight, bits, group_size, False)

    def plain_gptq() -> tuple[torch.Tensor, torch.Tensor]:
        factor = inverse_factor(damped(hessian, 0.01), order)
        return gptq(weight, factor, *grid, bits, group_size, order), factor

    seconds["gptq"], (integers, factor) = timed(plain_gptq, device, repeats)
    seconds["stage 1"], (scales, zeros) = timed(
        lambda: search_scales(weight, bits, group_size, False, hessian), device, repeats
    )
    integers = gptq(weight, factor, scales, zeros, bits, group_size, order)
    seconds["stage 2"], _ = timed(
        lambda: refine_scales(weight, hessian, integers, scales, zeros, group_size, 1), device, repeats
    )
    seconds["corrected target"], _ = timed(
        lambda: corrected_target(weight, weight @ deviation, factor, order, 0.25), device, repeats
    )
    seconds["descent"], _ = timed(
        lambda: joint_descent(weight, hessian, integers, scales, zeros, bits, group_size, sweeps), device, repeats
    )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sweeps", type=int, default=8, help="of the joint descent")
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="calibration tokens")
    parser.add_argument("--batch", type=int, default=8 * 2048, help="calibration tokens in one forward pass")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides all sizes: a quick check without a GPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    layers = {}
    steps: list[str] = []
    with full_float32():
        for name, rows, columns in SHAPES:
            layers[name] = time_layer(
                rows // arguments.shrink,
                columns // arguments.shrink,
                arguments.bits,
                arguments.group_size,
                arguments.device,
                arguments.batch // arguments.shrink,
                arguments.tokens // arguments.shrink,
                arguments.sweeps,
                arguments.repeats,
            )
            steps = list(layers[name])
    print("| layer | " + " | ".join(f"{step}, ms" for step in steps) + " |\n" + "|---" * (len(steps) + 1) + "|")
    for name, seconds in layers.items():
        print(f"| {name} | " + " | ".join(f"{1000 * seconds[step]:.0f}" for step in steps) + " |")
    model = {step: BLOCKS * sum(seconds[step] for seconds in layers.values()) for step in steps}
    print("| whole model, s | " + " | ".join(f"{model[step]:.1f}" for step in steps) + " |")
    plain = model["hessian"] + model["gptq"]
    stages = model["stage 1"] + model["stage 2"]
    default = sum(model.values()) - model["stage 2"]
    print(f"plain GPTQ {plain:.0f} s (without the Hessians {model['gptq']:.0f} s)")
    print(f"the two stages add {stages:.0f} s, {100 * stages / plain:.1f} %")
    print(f"the default method, all arithmetic: {default:.0f} s")
    if arguments.out:
        result = {
            "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
            "hardware": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "lkq_hf": lkq_hf.__version__,
            },
            "layers_seconds": layers,
            "model_seconds": model,
            "summary_seconds": {"plain GPTQ": plain, "two stages": stages, "default method": default},
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
