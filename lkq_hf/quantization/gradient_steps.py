"""The loop of gradient steps that block refinement and end-to-end tuning share."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.refined_weight import RefinedWeight
from lkq_hf.quantization.refinement import GradientSteps

# So many calibration windows are held out, an eighth of them if that is less: they decide whether a result is kept.
HELD_OUT = 4


def held_out_windows(samples: int) -> Tensor:
    """Which of so many calibration windows are held out, the last ones, bool `[samples]`; never the only one."""
    count = min(HELD_OUT, samples // 8) or int(samples > 1)
    return torch.arange(samples) >= samples - count


def compute_dtype(dtype: torch.dtype, device: torch.device, settings: GradientSteps) -> torch.dtype:
    """In which dtype a model of `dtype` is multiplied while it is refined."""
    mixed = settings.mixed_precision and device.type == "cuda" and dtype == torch.float32
    return torch.bfloat16 if mixed else dtype


def precision(dtype: torch.dtype, device: torch.device, settings: GradientSteps) -> AbstractContextManager[Any]:
    """The context for products in `compute_dtype`."""
    used = compute_dtype(dtype, device, settings)
    return nullcontext() if used == dtype else torch.autocast(device.type, dtype=used)


def changed_parameters(weights: Sequence[RefinedWeight]) -> list[Tensor]:
    """The parameters that have gradients."""
    return [parameter for weight in weights for parameter in weight.parameters() if parameter.requires_grad]


def take_steps(
    weights: Sequence[RefinedWeight],
    settings: GradientSteps,
    held_out: Sequence[Tensor],
    gradients: Callable[[int], Sequence[Tensor | None]],
    processes: Processes,
) -> None:
    """Changes `weights` by gradient, one batch a step.

    Args:
        held_out: which windows of each batch are held out; a batch without another window is passed over.
        gradients: of one batch's loss for the `changed_parameters`, given the batch's index; they may be overwritten.
        processes: whose gradients are added up.
    """
    parameters = changed_parameters(weights)
    optimizer = _optimizer(weights, settings)
    # A process all of whose windows are held out adds nothing to the gradients, but has to take every step.
    order = _batches([batch for batch, out in enumerate(held_out) if not bool(out.all())] or [0], settings.seed)
    for step in range(settings.steps):
        part = 1 - step / settings.steps
        with torch.enable_grad():
            found = gradients(next(order))
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        processes.sum_gradients(parameters)
        if settings.rounding == "vertex":
            for weight in weights:
                weight.move_to_vertex(settings.offset_rate * part)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = group["first"] * part
            optimizer.step()
        for weight in weights:
            weight.project()
    for parameter in parameters:
        parameter.grad = None


def _optimizer(weights: Sequence[RefinedWeight], settings: GradientSteps) -> Optimizer | None:
    """Of all that does not go to vertices, with the rate of the first step of each group as `first`."""
    first = 2 / settings.steps if settings.steps else 0.0  # of a fall to 0 whose mean is 1 / steps
    parameters: dict[float, list[Tensor]] = defaultdict(list)
    for weight in weights:
        rates = {
            "position": 0.0 if settings.rounding == "vertex" else settings.offset_rate,
            "factor": settings.scale_rate_at(weight.bits),
            "zero": settings.zero_rate,
        }
        for name, rate in rates.items():
            parameter = getattr(weight, name)
            if parameter.requires_grad and rate > 0:
                parameters[rate].append(parameter)
    groups: list[dict[str, Any]] = [{"params": found, "first": rate * first} for rate, found in parameters.items()]
    if not groups:
        return None
    # Far below any gradient: whatever the scale of the loss, a step has the length of its rate.
    # Without its memory Adam divides a gradient by its own size: the sign is left.
    memory = (0.0, 0.0) if settings.optimizer == "sign" else (0.9, 0.999)
    return Adam(groups, betas=memory, eps=1e-16, fused=groups[0]["params"][0].is_cuda)


def _batches(usable: Sequence[int], seed: int) -> Iterator[int]:
    """Batches in random order, all of them before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(usable), generator=generator).tolist():
            yield usable[index]
