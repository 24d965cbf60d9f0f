"""How the processes of a launch (`accelerate launch`, `torchrun`) share one calibration walk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, distributed

from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.solve import Solution
from lkq_hf.quantization.weight import QuantizedWeight


@dataclass(frozen=True)
class Processes:
    """This process among those that quantize a model together; the only one unless torch.distributed was initialized.

    Each passes its part of the calibration tokens through the blocks, takes the moments of its part, and solves its
    part of every layer's rows, or of the experts that are solved together. Moments are summed in the order of
    torch.distributed's all-reduce, each process's first over its own batches: next to one process they differ by
    float32 rounding. What is solved from them is sent whole, so all processes go on with the same weights to the last
    bit.
    """

    rank: int
    size: int

    @classmethod
    def current(cls) -> Self:
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls(0, 1)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            distributed.barrier()

    def part(self, tokens: Tensor) -> Tensor:
        """This process's calibration samples, of `[samples, length]`.

        Raises:
            ValueError: fewer samples than processes.
        """
        if len(tokens) < self.size:
            raise ValueError(
                f"{len(tokens)} calibration samples cannot be divided among {self.size} processes; use more samples "
                "(num_samples) or fewer processes"
            )
        return tokens.tensor_split(self.size)[self.rank]

    def first(self, value: Any) -> Any:
        """The first process's value."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def reduce(self, moments: InputMoments) -> None:
        """Makes moments of one process's tokens those of all tokens, in place."""
        if self.size == 1:
            return
        counts = torch.tensor(
            [moments.tokens, moments.weight, moments.deviation is None],
            dtype=torch.float64,
            device=moments.hessian.device,
        )
        distributed.all_reduce(counts)
        tokens, weight, without_deviation = counts.tolist()
        if without_deviation:
            moments.deviation = None
        share = moments.weight / weight if weight else 0.0
        for moment in (moments.hessian, moments.deviation):
            if moment is not None:
                distributed.all_reduce(moment.mul_(share))
        moments.tokens, moments.weight = int(tokens), weight

    def sum(self, value: Tensor) -> None:
        """Adds up the processes' values, in place."""
        if self.size > 1:
            distributed.all_reduce(value)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Adds up the processes' gradients, in place; a parameter that one of them did not use has zeros there."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    def same(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The first process's weight: what each made of the same gradients may differ by rounding."""
        if self.size == 1:
            return weight
        parts = (weight.integers.to(torch.uint8), weight.scales.clone(), weight.zeros.to(torch.uint8))
        for part in parts:
            distributed.broadcast(part, src=0)
        integers, scales, zeros = parts
        return replace(
            weight, integers=integers.to(weight.integers.dtype), scales=scales, zeros=zeros.to(weight.zeros.dtype)
        )

    def solve(self, size: int, quantize: Callable[[slice], Solution]) -> Solution:
        """What `quantize` makes of a whole, each process of some: rows and weights do not depend on each other.

        Args:
            size: of the first dimension of the solution, in which it is divided: a layer's rows, or several weights.
            quantize: called with a part of them.
        """
        if self.size == 1:
            return quantize(slice(0, size))
        # Where there are fewer than processes, the last ones repeat the last part.
        count = min(self.size, size)
        edges = [size * index // count for index in range(count + 1)]
        mine = min(self.rank, count - 1)
        own = quantize(slice(edges[mine], edges[mine + 1]))
        sizes = [end - start for start, end in pairwise(edges)]
        weight = own.weight
        errors = torch.stack([*own.losses.values(), own.energy], dim=1)
        *losses, energy = self._gather(errors, sizes).unbind(1)
        offsets = None if own.offsets is None else self._gather(own.offsets, sizes)
        return Solution(
            QuantizedWeight(
                self._gather(weight.integers.to(torch.uint8), sizes).to(weight.integers.dtype),
                self._gather(weight.scales, sizes),
                self._gather(weight.zeros.to(torch.uint8), sizes).to(weight.zeros.dtype),
                weight.bits,
                weight.group_size,
                weight.sym,
            ),
            dict(zip(own.losses, losses, strict=True)),
            energy,
            offsets,
        )

    def _gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """All processes' rows, one after another, from the first `len(sizes)` of them."""
        whole = own.new_empty(sum(sizes), *own.shape[1:])
        for source, part in enumerate(whole.split(list(sizes))):
            if source == self.rank:
                part.copy_(own)
            distributed.broadcast(part, src=source)
        return whole
