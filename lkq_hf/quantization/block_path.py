"""A block on its way through the calibration windows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.capture import BlockCall


@dataclass(frozen=True)
class BlockPath:
    """A block, how the model calls it, and the hidden states that enter it, batch by batch.

    While a block is quantized it is on one path, behind the quantized blocks, and its full-precision twin is on
    another, behind full-precision blocks.
    """

    block: nn.Module
    call: BlockCall
    states: Activations

    @property
    def batches(self) -> range:
        return range(len(self.states))

    @property
    def device(self) -> torch.device:
        return self.states.device

    def output(self, batch: int, block: Callable[..., Any] | None = None) -> Tensor:
        """The hidden states after the block, or after another in its place, `[batch, length, hidden]`."""
        return self.call.run(self.block if block is None else block, self.states.get(batch), batch)
