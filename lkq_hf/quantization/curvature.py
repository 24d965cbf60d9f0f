"""The diagonal of a loss's curvature in the weights of linear layers, as an outer product of two vectors a layer."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.processes import Processes

# From so many batches it is estimated.
CURVATURE_BATCHES = 2


class Curvature:
    """Second moments of what enters linear layers, and of what is sent back to their outputs.

    The diagonal of Gauss and Newton's matrix, factored as in K-FAC (arXiv 1503.05671): the mean square of a layer's
    inputs, and that of its outputs' gradients, for a loss whose gradient is drawn at random, with the Gauss-Newton
    matrix of the true loss as its second moment.

    Args:
        layers: by name; what some of them are not given counts as zeros.
        device: where they run.
    """

    def __init__(self, layers: Mapping[str, nn.Module], device: torch.device) -> None:
        self._layers, self._device = layers, device
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._seen = dict.fromkeys(layers, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What runs forward and backward inside counts."""
        with ExitStack() as stack, torch.enable_grad():
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_hook(self._hook(name)).remove)
            yield

    def factors(self, weight: float, processes: Processes) -> dict[str, tuple[Tensor, Tensor]]:
        """For each layer the weighted sum over its outputs' gradients, `[out]`, and the mean over its inputs, `[in]`.

        Args:
            weight: that the loss gives a squared gradient.
            processes: whose moments count together.
        """
        result = {}
        for name, layer in self._layers.items():
            matrix = linear_weight(layer)
            rows, columns = (torch.zeros(size, device=self._device) for size in matrix.shape)
            rows, columns = self._outputs.get(name, rows), self._inputs.get(name, columns)
            seen = torch.tensor(float(self._seen[name]), device=self._device)
            for moment in (rows, columns, seen):
                processes.sum(moment)
            result[name] = rows * weight, columns / seen.clamp(min=1)
        return result

    def _hook(self, name: str) -> Any:
        def add(into: dict[str, Tensor], value: Tensor) -> None:
            squares = value.detach().float().flatten(0, -2).square().sum(0)
            into[name] = into[name] + squares if name in into else squares

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            add(self._inputs, args[0])
            self._seen[name] += args[0].shape[:-1].numel()
            if output.requires_grad:
                output.register_hook(lambda gradient: add(self._outputs, gradient))

        return hook
