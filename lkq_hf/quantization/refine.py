"""Block refinement: scales, zero points and roundings of a block's layers, by gradient of the block's output error."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.block_gradients import BlockGradients
from lkq_hf.quantization.block_path import BlockPath
from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.curvature import CURVATURE_BATCHES, Curvature
from lkq_hf.quantization.gradient_steps import (
    changed_parameters,
    compute_dtype,
    precision,
    take_steps,
)
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.refined_weight import RefinedWeight
from lkq_hf.quantization.refinement import BlockRefinement
from lkq_hf.quantization.weight import QuantizedWeight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReport:
    """A refined block's error on held-out windows, relative to its output's energy, and whether it was kept."""

    name: str
    before: float
    after: float

    @property
    def accepted(self) -> bool:
        return self.after < self.before


def with_weights(block: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Any]:
    """A block as a function, with other weights, `[out, in]`, in some of its layers."""
    tensors = {}
    for name, weight in weights.items():
        tensors[f"{name}.weight"] = weight if type(block.get_submodule(name)) is nn.Linear else weight.T
    return lambda *args, **kwargs: functional_call(block, tensors, args, kwargs)


@dataclass(frozen=True)
class BlockRefiner:
    """Minimizes the squared error of a block's output over scales, zero points and roundings of its layers.

    Args:
        settings: steps and rates.
        held_out: which windows of each batch are held out, bool `[windows]`.
        processes: who shares the work.
    """

    settings: BlockRefinement
    held_out: Sequence[Tensor]
    processes: Processes

    @torch.no_grad()
    def refine(
        self,
        name: str,
        path: BlockPath,
        full: BlockPath,
        weights: dict[str, QuantizedWeight],
        offsets: dict[str, Tensor],
        targets: Activations,
        factor: Tensor | None = None,
    ) -> tuple[dict[str, QuantizedWeight], BlockReport]:
        """Refines a block that was solved.

        The block sees the quantized path's inputs; its output is compared with the full-precision block's
        (`BlockRefinement.target_mix`). The refined weights are kept only if the error on the held-out windows fell.

        Args:
            name: of the block, for the report.
            path: the block as it was solved.
            full: its full-precision twin.
            weights: the solved weights by the layers' names inside the block.
            offsets: by the same names, from each integer to the vertex of its layer's objective, in grid steps.
            targets: an empty store for the outputs aimed at.
            factor: errors are multiplied by it before they are squared, `[hidden, hidden]` (`error_factor`).

        Returns:
            The refined weights, or `weights`, and the report.
        """
        settings = self.settings
        for batch in path.batches:
            targets.append(_target(path, full, batch, settings.target_mix))
        before = self._error(path, targets, weights, factor)
        layers = {
            key: RefinedWeight(weight, settings, offsets.get(key) if settings.start_from_vertex else None)
            for key, weight in weights.items()
        }
        changing = list(layers.values())
        dtype = linear_weight(path.block.get_submodule(next(iter(weights)))).dtype
        kept = [(~chosen).to(path.device).unsqueeze(1) for chosen in self.held_out]
        call = path.call.on(path.device)
        if settings.rounding == "vertex":
            for key, curvature in self._curvatures(path, targets, weights, factor).items():
                layers[key].curvature = curvature

        def loss(hidden: Tensor, target: Tensor, kept: Tensor, batch: int) -> Tensor:
            with precision(dtype, path.device, settings):
                used = compute_dtype(dtype, path.device, settings)
                run = with_weights(path.block, {key: layer(used) for key, layer in layers.items()})
                output = call.run(run, hidden, batch)
            # Multiplied and not selected: the device need not wait for the number of windows.
            return (_squared_error(output, target, settings.token_power, factor) * kept).sum() / target.numel()

        gradients = BlockGradients(loss, changed_parameters(changing), path.states, targets, kept, call)
        take_steps(changing, settings, self.held_out, gradients, self.processes)
        gradients.release()
        refined = {key: self.processes.same(layer.quantized()) for key, layer in layers.items()}
        report = BlockReport(name, before, self._error(path, targets, refined, factor))
        logger.info("%s: error on held-out windows %.4g, refined %.4g", name, report.before, report.after)
        return (refined if report.accepted else weights), report

    def _curvatures(
        self, path: BlockPath, targets: Activations, weights: dict[str, QuantizedWeight], factor: Tensor | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """For each layer two vectors, `[out]` and `[in]`, whose outer product is the loss's curvature in its weights.

        Random signs in place of the residuals are what is sent back (`Curvature`).
        """
        settings = self.settings
        generator = torch.Generator(path.device).manual_seed(settings.seed)
        sums = torch.zeros(2, dtype=torch.float64, device=path.device)  # of tokens, and of the width in all processes
        layers = {key: path.block.get_submodule(key) for key in weights}
        dense = {
            key: weight.dequantize(linear_weight(layers[key]).dtype).requires_grad_()
            for key, weight in weights.items()
        }
        curvature = Curvature(layers, path.device)
        with curvature.watching():
            for batch in path.batches[:CURVATURE_BATCHES]:
                target = targets.get(batch)
                output = path.output(batch, with_weights(path.block, dense))
                residual = _residual(output, target, settings.token_power, factor)
                signs = torch.randint(0, 2, residual.shape, generator=generator, device=path.device).mul_(2).sub_(1)
                torch.autograd.grad((residual * signs).sum(), list(dense.values()), allow_unused=True)
                sums[0] += target.shape[0] * target.shape[1]
                sums[1] = target[0, 0].numel()
        self.processes.sum(sums)
        tokens, width = sums.tolist()
        # Every process adds the gradient of its batch's squared error, divided by the batch's elements.
        weight = 2 * self.processes.size**2 / (tokens * width)
        return curvature.factors(weight * (1 + settings.damping), self.processes)

    def _error(
        self, path: BlockPath, targets: Activations, weights: dict[str, QuantizedWeight], factor: Tensor | None
    ) -> float:
        """Squared error on the held-out windows of all processes, relative to the energy of the targets there."""
        power = self.settings.token_power
        dtypes = {key: linear_weight(path.block.get_submodule(key)).dtype for key in weights}
        run = with_weights(path.block, {key: weight.dequantize(dtypes[key]) for key, weight in weights.items()})
        sums = torch.zeros(2, dtype=torch.float64, device=path.device)
        for batch, chosen in enumerate(self.held_out):
            if bool(chosen.any()):
                inside = chosen.to(path.device)
                output, target = path.output(batch, run)[inside], targets.get(batch)[inside]
                sums[0] += _squared_error(output, target, power, factor).sum().double()
                sums[1] += _squared_error(torch.zeros_like(target), target, power, factor).sum().double()
        self.processes.sum(sums)
        error, energy = sums.tolist()
        return error / max(energy, torch.finfo(torch.float32).tiny)


def _target(path: BlockPath, full: BlockPath, batch: int, mix: float) -> Tensor:
    of_full = full.output(batch) if mix > 0 else None
    if of_full is not None and mix == 1:
        return of_full
    own = path.output(batch, full.block)
    return own if of_full is None else torch.lerp(own.float(), of_full.float(), mix).to(own.dtype)


def _residual(output: Tensor, target: Tensor, token_power: float, factor: Tensor | None) -> Tensor:
    """What is squared to be the error, `[windows, length, ..., hidden]`."""
    target = target.float()
    residual = output.float() - target
    if factor is not None:
        residual = residual @ factor
    if token_power:
        energy = target.square().mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        residual = residual / energy.pow(token_power / 2)
    return residual


def _squared_error(output: Tensor, target: Tensor, token_power: float, factor: Tensor | None) -> Tensor:
    """Squared errors by token, `[windows, length]`."""
    return _residual(output, target, token_power, factor).square().flatten(2).sum(-1)
