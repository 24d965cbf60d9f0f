"""The loop of gradient steps that block refinement and end-to-end tuning share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.refined_weight import RefinedWeight
from lkq_hf.quantization.refinement import GradientSteps

# Of so many calibration windows, the last is held out: it decides whether a result is kept.
HELD_OUT = 8


def held_out_windows(sizes: Sequence[int]) -> list[Tensor]:
    """Which windows of batches of these sizes are held out, one bool `[windows]` a batch."""
    total = sum(sizes)
    chosen = torch.arange(total) % HELD_OUT == HELD_OUT - 1
    if 1 < total < HELD_OUT:
        chosen[-1] = True
    return list(chosen.split(list(sizes)))


def compute_dtype(dtype: torch.dtype, device: torch.device, settings: GradientSteps) -> torch.dtype:
    """In which dtype a model of `dtype` is multiplied while it is refined."""
    mixed = settings.mixed_precision and device.type == "cuda" and dtype == torch.float32
    return torch.bfloat16 if mixed else dtype


def precision(dtype: torch.dtype, device: torch.device, settings: GradientSteps) -> AbstractContextManager[Any]:
    """The context for products in `compute_dtype`."""
    used = compute_dtype(dtype, device, settings)
    return nullcontext() if used == dtype else torch.autocast(device.type, dtype=used)


def take_steps(
    weights: Sequence[RefinedWeight],
    settings: GradientSteps,
    held_out: Sequence[Tensor],
    add_gradients: Callable[[int], None],
    processes: Processes,
) -> None:
    """Changes `weights` by gradient, one batch a step.

    Args:
        held_out: from `held_out_windows`; a batch without another window is passed over.
        add_gradients: adds the gradients of one batch's loss to the parameters, given the batch's index.
        processes: whose gradients are added up.
    """
    optimizers = _optimizers(weights, settings)
    schedules = [LambdaLR(optimizer, lambda step: 1 - step / settings.steps) for optimizer in optimizers]
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    # A process all of whose windows are held out adds nothing to the gradients, but has to take every step.
    order = _batches([batch for batch, out in enumerate(held_out) if not bool(out.all())] or [0], settings.seed)
    for _ in range(settings.steps):
        with torch.enable_grad():
            add_gradients(next(order))
        processes.sum_gradients(parameters)
        if settings.rounding == "vertex":
            for weight in weights:
                weight.aim_at_vertex()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        for weight in weights:
            weight.project()


def _optimizers(weights: Sequence[RefinedWeight], settings: GradientSteps) -> list[Optimizer]:
    """The chosen optimizer, and one for what goes to vertices."""
    first = 2 / settings.steps  # of a fall to 0 whose mean is 1 / steps
    positions = [weight.position for weight in weights] if settings.offset_rate > 0 else []
    to_vertex = settings.rounding == "vertex"
    groups: list[dict[str, Any]] = [
        {"params": [] if to_vertex else positions, "lr": settings.offset_rate * first},
        {"params": [weight.factor for weight in weights], "lr": settings.scale_rate * first},
        {"params": [weight.zero for weight in weights if not weight.sym], "lr": settings.zero_rate * first},
    ]
    groups = [group for group in groups if group["params"] and group["lr"] > 0]
    optimizers: list[Optimizer] = []
    if groups:
        # Far below any gradient: whatever the scale of the loss, a step has the length of its rate.
        # Without its memory Adam divides a gradient by its own size: the sign is left.
        memory = (0.0, 0.0) if settings.optimizer == "sign" else (0.9, 0.999)
        optimizers.append(Adam(groups, betas=memory, eps=1e-16))
    if to_vertex and positions:
        optimizers.append(SGD(positions, lr=settings.offset_rate))
    return optimizers


def _batches(usable: Sequence[int], seed: int) -> Iterator[int]:
    """Batches in random order, all of them before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(usable), generator=generator).tolist():
            yield usable[index]
