"""Block refinement: scales, zero points and roundings of a block's layers, by gradient of the block's output error."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.capture import BlockCall
from lkq_hf.quantization.grid import SCALE_DTYPE, stored
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.refinement_settings import RefinementSettings
from lkq_hf.quantization.weight import QuantizedWeight

logger = logging.getLogger(__name__)

# Of so many calibration windows, the last is held out: it decides whether a refined block is kept.
HELD_OUT = 8
# How far a weight's position may pass the ends of the grid: it still rounds to them.
MARGIN = 0.49


@dataclass(frozen=True)
class BlockReport:
    """A refined block's error on held-out windows, relative to its output's energy, and whether it was kept."""

    name: str
    before: float
    after: float

    @property
    def accepted(self) -> bool:
        return self.after < self.before


class Refined(nn.Module):
    """A layer's quantized weight as parameters: positions on the grid, logarithms of scale factors, zero points."""

    def __init__(self, weight: QuantizedWeight, offsets: Tensor | None, settings: RefinementSettings) -> None:
        super().__init__()
        self.weight = weight
        self.settings = settings
        self.largest = 2**weight.bits - 1
        position = weight.integers.float()
        if settings.start_from_vertex and offsets is not None:
            position = position + offsets.float().clamp(-MARGIN, MARGIN)
        self.position = nn.Parameter(position, requires_grad=settings.offset_rate > 0)
        self.factor = nn.Parameter(torch.zeros_like(weight.scales, dtype=torch.float32), settings.scale_rate > 0)
        self.zero = nn.Parameter(weight.zeros.float(), requires_grad=settings.zero_rate > 0 and not weight.sym)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, `[out, in]`."""
        scale = self.weight.scales.float() * self.factor.exp()
        return _Dequantize.apply(self.position, scale, self.zero, self.largest, self.weight.group_size, dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Takes positions and zero points back to where they may be."""
        bound = self.settings.offset_bound
        start = self.weight.integers
        self.position.copy_(torch.maximum(torch.minimum(self.position, start + bound), start - bound))
        self.position.clamp_(-MARGIN, self.largest + MARGIN)
        self.zero.clamp_(0, self.largest)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight as it is stored."""
        return replace(
            self.weight,
            integers=self.position.round().clamp(0, self.largest).to(torch.int32),
            scales=stored(self.weight.scales.float() * self.factor.exp()).to(SCALE_DTYPE),
            zeros=self.zero.round().to(torch.int32),
        )


class _Dequantize(torch.autograd.Function):
    """`scale * (round(position) - round(zero))`, whose gradient takes rounding for the identity."""

    @staticmethod
    def forward(
        ctx: Any, position: Tensor, scale: Tensor, zero: Tensor, largest: int, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(position, scale, zero)
        ctx.largest, ctx.group_size = largest, group_size
        level = _level(position, zero, largest, group_size)
        return level.mul_(scale.unsqueeze(-1)).view_as(position).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        position, scale, zero = ctx.saved_tensors
        gradient = gradients[0].float().view(*scale.shape, ctx.group_size)
        of_position = of_scale = of_zero = None
        if ctx.needs_input_grad[1]:
            of_scale = (_level(position, zero, ctx.largest, ctx.group_size).mul_(gradient)).sum(-1)
        if ctx.needs_input_grad[2]:
            of_zero = -scale * gradient.sum(-1)
        if ctx.needs_input_grad[0]:
            of_position = (gradient * scale.unsqueeze(-1)).view_as(position)
        return of_position, of_scale, of_zero, None, None, None


def _level(position: Tensor, zero: Tensor, largest: int, group_size: int) -> Tensor:
    integers = position.round().clamp_(0, largest)
    return integers.view(*zero.shape, group_size).sub_(zero.round().unsqueeze(-1))


@dataclass(frozen=True)
class BlockPaths:
    """A block with quantized weights, its full-precision twin, and the hidden states that enter the two."""

    block: nn.Module
    twin: nn.Module
    call: BlockCall
    quantized: Activations
    full: Activations
    processes: Processes

    def runner(self, weights: dict[str, Tensor]) -> Callable[..., Any]:
        """The block as a function, with other weights in some of its layers."""
        tensors = {}
        for name, weight in weights.items():
            layer = self.block.get_submodule(name)
            tensors[f"{name}.weight"] = weight if type(layer) is nn.Linear else weight.T
        return lambda *args, **kwargs: functional_call(self.block, tensors, args, kwargs)


def refine_block(
    paths: BlockPaths,
    name: str,
    weights: dict[str, QuantizedWeight],
    offsets: dict[str, Tensor],
    settings: RefinementSettings,
    targets: Activations,
) -> tuple[dict[str, QuantizedWeight], BlockReport]:
    """Minimizes the squared error of a block's output over scales, zero points and roundings of its layers.

    The block sees the quantized path's inputs; its output is compared with the full-precision block's
    (`RefinementSettings.target_mix`). Rounding passes gradients as if it were the identity (straight-through). Every
    eighth calibration window is held out, and the refined weights are kept only if the error there fell.

    Args:
        paths: the block as it was solved, and what enters it.
        name: of the block, for the report.
        weights: the solved weights by the layers' names inside the block.
        offsets: by the same names, from each integer to the vertex of its layer's objective, in grid steps.
        targets: an empty store for the outputs aimed at.

    Returns:
        The refined weights, or `weights`, and the report.
    """
    held_out = _held_out(paths)
    for batch in range(len(paths.quantized)):
        targets.append(_target(paths, batch, settings.target_mix))
    before = _error(paths, targets, held_out, weights, settings)
    layers = {key: Refined(weight, offsets.get(key), settings) for key, weight in weights.items()}
    _descend(paths, targets, held_out, layers, settings)
    refined = {key: paths.processes.same(layer.quantized()) for key, layer in layers.items()}
    after = _error(paths, targets, held_out, refined, settings)
    report = BlockReport(name, before, after)
    logger.info("%s: error on held-out windows %.4g, refined %.4g", name, before, after)
    return (refined if report.accepted else weights), report


def _held_out(paths: BlockPaths) -> list[Tensor]:
    """Which windows of each batch are held out, bool `[windows]`."""
    sizes = [paths.quantized.windows(batch) for batch in range(len(paths.quantized))]
    total = sum(sizes)
    chosen = torch.arange(total) % HELD_OUT == HELD_OUT - 1
    if total < HELD_OUT:
        chosen[-1] = total > 1
    return list(chosen.to(paths.quantized.device).split(sizes))


@torch.no_grad()
def _target(paths: BlockPaths, batch: int, mix: float) -> Tensor:
    full = paths.call.run(paths.twin, paths.full.get(batch), batch) if mix > 0 else None
    if full is not None and mix == 1:
        return full
    own = paths.call.run(paths.twin, paths.quantized.get(batch), batch)
    return own if full is None else torch.lerp(own.float(), full.float(), mix).to(own.dtype)


def _descend(
    paths: BlockPaths,
    targets: Activations,
    held_out: Sequence[Tensor],
    layers: dict[str, Refined],
    settings: RefinementSettings,
) -> None:
    optimizer = _optimizer(layers.values(), settings)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    dtype = linear_weight(paths.block.get_submodule(next(iter(layers)))).dtype
    device = paths.quantized.device
    mixed = settings.mixed_precision and device.type == "cuda" and dtype == torch.float32
    dtype = torch.bfloat16 if mixed else dtype
    precision: AbstractContextManager[Any] = (
        torch.autocast(device.type, dtype=torch.bfloat16) if mixed else nullcontext()
    )
    # A process all of whose windows are held out adds nothing to the gradients, but has to take every step.
    usable = [batch for batch, out in enumerate(held_out) if not bool(out.all())] or [0]
    order = _batches(usable, settings.seed)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in (next(order) for _ in range(settings.steps)):
        hidden, target, kept = paths.quantized.get(batch), targets.get(batch), ~held_out[batch]
        with torch.enable_grad():
            with precision:
                run = paths.runner({key: layer(dtype) for key, layer in layers.items()})
                output = paths.call.run(run, hidden, batch)
            error = _squared_error(output[kept], target[kept], settings.token_power)
            (error.sum() / target.numel()).backward()
        paths.processes.sum_gradients(parameters)
        if settings.optimizer == "sign":
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.sign_()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for layer in layers.values():
            layer.project()


def _optimizer(layers: Any, settings: RefinementSettings) -> Optimizer:
    layers = list(layers)
    # The mean rate of a linear fall to 0 is half the first: so the first is twice what is to be gone on average.
    scale = 2 / settings.steps
    groups = [
        {"params": [layer.position for layer in layers], "lr": settings.offset_rate * scale},
        {"params": [layer.factor for layer in layers], "lr": settings.scale_rate * scale},
        {"params": [layer.zero for layer in layers if not layer.weight.sym], "lr": settings.zero_rate * scale},
    ]
    groups = [group for group in groups if group["params"] and group["lr"] > 0]
    return SGD(groups) if settings.optimizer == "sign" else Adam(groups)


def _batches(usable: Sequence[int], seed: int) -> Iterator[int]:
    """Batches in random order, all of them before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(usable), generator=generator).tolist():
            yield usable[index]


def _squared_error(output: Tensor, target: Tensor, token_power: float) -> Tensor:
    """Squared errors by token, `[windows, length]`."""
    target = target.float()
    error = (output.float() - target).square().sum(-1)
    if token_power:
        error = error / target.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny).pow(token_power)
    return error


@torch.no_grad()
def _error(
    paths: BlockPaths,
    targets: Activations,
    held_out: Sequence[Tensor],
    weights: dict[str, QuantizedWeight],
    settings: RefinementSettings,
) -> float:
    """Squared error on the held-out windows of all processes, relative to the energy of the targets there."""
    dense = {
        key: weight.dequantize(linear_weight(paths.block.get_submodule(key)).dtype) for key, weight in weights.items()
    }
    run = paths.runner(dense)
    sums = torch.zeros(2, dtype=torch.float64, device=paths.quantized.device)
    for batch, chosen in enumerate(held_out):
        if bool(chosen.any()):
            output = paths.call.run(run, paths.quantized.get(batch), batch)[chosen]
            target = targets.get(batch)[chosen]
            sums[0] += _squared_error(output, target, settings.token_power).sum().double()
            sums[1] += _squared_error(torch.zeros_like(target), target, settings.token_power).sum().double()
    paths.processes.sum(sums)
    error, energy = sums.tolist()
    return error / max(energy, torch.finfo(torch.float32).tiny)
