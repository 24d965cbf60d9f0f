"""The gradients of a block's error, batch by batch; on a GPU they are recorded as a CUDA graph and replayed."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lkq_hf.kernels.cuda_graph import record, refusing_to_wait
from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.capture import BlockCall

logger = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Of a batch's hidden states, its targets, which windows count, and its index."""


class BlockGradients:
    """The gradients of a loss for some parameters, by the index of a batch.

    On a GPU the first batches run kernel by kernel. Then one is recorded, and from then on one graph is launched
    for each batch with the same shapes and arguments. Where a block cannot be recorded (it waits for the GPU, as
    routing to experts does), all batches run kernel by kernel.

    Args:
        loss: what has gradients.
        parameters: for which.
        hidden: what enters the block.
        targets: what its output is compared with.
        kept: which windows count, bool `[windows, 1]` on the device, by batch.
        call: of the block, with arguments on the device.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[Tensor],
        hidden: Activations,
        targets: Activations,
        kept: Sequence[Tensor],
        call: BlockCall,
    ) -> None:
        self._loss, self._parameters = loss, parameters
        self._hidden, self._targets, self._kept, self._call = hidden, targets, kept, call
        self._first: int | None = None  # the batch that ran first, whose shapes and arguments a graph takes
        self._inputs: list[Tensor] = []
        self._found: tuple[Tensor | None, ...] = ()
        self._replay: Callable[[], None] | None = None
        self._fails = not records(hidden.device)

    def __call__(self, batch: int) -> tuple[Tensor | None, ...]:
        """The gradients; the next call may overwrite them. `None` for what the block did not use."""
        if self._fails or self._first is None or not self._is_like(self._first, batch):
            self._first = batch if self._first is None else self._first
            return self._gradients(self._hidden.get(batch), self._targets.get(batch), self._kept[batch], batch)
        if self._replay is None:
            self._record(batch)
            if self._replay is None:
                return self(batch)
        hidden, target, kept = self._inputs
        self._hidden.copy_to(batch, hidden)
        self._targets.copy_to(batch, target)
        kept.copy_(self._kept[batch])
        self._replay()
        return self._found

    def release(self) -> None:
        """Gives back the memory of the graph; to be called after the last batch."""
        if self._replay is not None:
            self._replay, self._inputs, self._found, self._fails = None, [], (), True
            # What a graph had is not handed to others as long as torch keeps it.
            torch.cuda.empty_cache()

    def _gradients(self, hidden: Tensor, target: Tensor, kept: Tensor, batch: int) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(self._loss(hidden, target, kept, batch), self._parameters, allow_unused=True)

    def _is_like(self, first: int, batch: int) -> bool:
        return self._kept[first].shape == self._kept[batch].shape and self._call.same_arguments(first, batch)

    def _record(self, batch: int) -> None:
        self._inputs = [self._hidden.get(batch), self._targets.get(batch), self._kept[batch].clone()]

        def run() -> None:
            hidden, target, kept = self._inputs
            self._found = self._gradients(hidden, target, kept, batch)

        device = self._hidden.device
        try:
            with refusing_to_wait(device):
                run()
            # A graph has memory of its own, beside what torch keeps of the batches before.
            torch.cuda.empty_cache()
            self._replay = record(run, device)
        except RuntimeError as error:
            self._fails, self._inputs, self._found = True, [], ()
            logger.info("steps are launched kernel by kernel, as they cannot be recorded as a CUDA graph: %s", error)


def records(device: torch.device) -> bool:
    """Whether what runs on a device can be recorded."""
    return device.type == "cuda" and torch.version.cuda is not None
