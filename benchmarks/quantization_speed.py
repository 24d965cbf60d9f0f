"""Time to quantize one layer of each shape of Llama-3.1-8B on a GPU, and the whole model's arithmetic from it.

    python benchmarks/quantization_speed.py --bits 4 --group-size 128 --out benchmarks/results/quantization_speed.json

Weights and calibration inputs are random: no step's time depends on their values. Timed are the accumulation of both
moments, GPTQ, the two stages of the paper, and the joint descent of the default method. Layers that share an input
(q, k, v; gate, up) are solved together, as the calibration walk does. Forward passes and loading are not included.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import parser, save, seconds_of, settings
from tables import columns

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


def time_layer(rows: int, columns: int, batch: int, tokens: int, given: Any) -> dict[str, float]:
    """Seconds of each step for one layer, `[rows, columns]`."""
    bits, group_size, device = given.bits, given.group_size, given.device

    def timed(operation: Callable[[], Any]) -> tuple[float, Any]:
        times, result = seconds_of(operation, given.repeats)
        return min(times), result

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
    seconds["hessian"] = timed(lambda: plain.add(x_tilde))[0] * passes
    both = InputMoments(columns, device)
    seconds["deviation"] = timed(lambda: both.add(x_tilde, x))[0] * passes - seconds["hessian"]

    seconds["order"], order = timed(lambda: costliest_first_order(inverse_factor(damped(hessian, 0.01))))
    grid = minmax_grid(weight, bits, group_size, False)

    def plain_gptq() -> tuple[torch.Tensor, torch.Tensor]:
        factor = inverse_factor(damped(hessian, 0.01), order)
        return gptq(weight, factor, *grid, bits, group_size, order), factor

    seconds["gptq"], (integers, factor) = timed(plain_gptq)
    seconds["stage 1"], (scales, zeros) = timed(lambda: search_scales(weight, bits, group_size, False, hessian))
    integers = gptq(weight, factor, scales, zeros, bits, group_size, order)
    chosen = integers, scales, zeros
    seconds["stage 2"], _ = timed(lambda: refine_scales(weight, hessian, *chosen, group_size, 1))
    seconds["corrected target"], _ = timed(lambda: corrected_target(weight, weight @ deviation, factor, order, 0.25))
    seconds["descent"], _ = timed(lambda: joint_descent(weight, hessian, *chosen, bits, group_size, given.sweeps))
    return seconds


def main() -> None:
    options = parser(__doc__, required=False)
    options.add_argument("--bits", type=int, default=4)
    options.add_argument("--group-size", type=int, default=128)
    options.add_argument("--sweeps", type=int, default=8, help="of the joint descent")
    options.add_argument("--tokens", type=int, default=128 * 2048, help="calibration tokens")
    options.add_argument("--batch", type=int, default=8 * 2048, help="calibration tokens in one forward pass")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--device", default="cuda")
    options.add_argument("--shrink", type=int, default=1, help="divides all sizes: a quick check without a GPU")
    given = options.parse_args()
    by = given.shrink
    with full_float32():
        layers = {
            name: time_layer(rows // by, width // by, given.batch // by, given.tokens // by, given)
            for name, rows, width in SHAPES
        }
    model = {step: BLOCKS * sum(each[step] for each in layers.values()) for step in layers["o"]}
    summary = {
        "plain GPTQ": model["hessian"] + model["gptq"],
        "two stages": model["stage 1"] + model["stage 2"],
        "default method": sum(model.values()) - model["stage 2"],
    }
    rows = [{"layer": name} | each for name, each in (layers | {"whole model": model}).items()]
    print(columns(rows, "layer={layer} | " + " | ".join(f"{step}, s={{{step}:.3f}}" for step in model)), summary)
    versions = {each.__name__: each.__version__ for each in (torch, transformers, lkq_hf)}
    result = {
        "settings": settings(given),
        "hardware": torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU",
        "versions": versions,
        "layers_seconds": layers,
        "model_seconds": model,
        "summary_seconds": summary,
    }
    save(given.out, result)


if __name__ == "__main__":
    main()
