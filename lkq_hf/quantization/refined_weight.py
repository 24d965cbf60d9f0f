"""A quantized weight whose scales, zero points and roundings have gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from lkq_hf.kernels.grid_positions import gradients, move, value
from lkq_hf.quantization.grid import SCALE_DTYPE, stored
from lkq_hf.quantization.refinement import GradientSteps
from lkq_hf.quantization.weight import QuantizedWeight

# How far a weight's position may pass the ends of the grid: it still rounds to them.
MARGIN = 0.49


class RefinedWeight(nn.Module):
    """A quantized weight as parameters: positions on the grid, logarithms of scale factors, zero points.

    Rounding passes gradients as if it were the identity (straight-through).

    Args:
        weight: what to start from.
        settings: which of the three have gradients; integers that stay take one byte a weight.
        offsets: of the positions from the integers, in grid steps, `[out, in]`.
    """

    position: Tensor
    start: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight, settings: GradientSteps, offsets: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.group_size, self.sym = weight.bits, weight.group_size, weight.sym
        self.largest = 2**weight.bits - 1
        self.bound = settings.offset_bound
        self.curvature: tuple[Tensor, Tensor] | None = None
        self.register_buffer("start", weight.integers.to(torch.uint8).contiguous())
        self.register_buffer("scales", weight.scales.contiguous())
        if settings.offset_rate > 0:
            position = weight.integers.float().contiguous()
            if offsets is not None:
                position += offsets.float().clamp(-MARGIN, MARGIN)
            self.position = nn.Parameter(position)
        else:
            self.position = self.start
        self.factor = nn.Parameter(torch.zeros_like(self.scales, dtype=torch.float32), settings.scale_rate > 0)
        zero = weight.zeros.float().contiguous()
        self.zero = nn.Parameter(zero, requires_grad=settings.zero_rate > 0 and not weight.sym)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, `[out, in]`."""
        weight: Tensor = _Dequantize.apply(self.position, self._scale(), self.zero, self.largest, dtype)
        return weight

    @torch.no_grad()
    def move_to_vertex(self, rate: float) -> None:
        """Moves positions so much of the way to where the loss is least in each with all others fixed (`move`)."""
        if self.curvature is not None and self.position.grad is not None:
            near = rate, self.bound, self.largest, MARGIN
            move(self.position, self.position.grad, self._scale(), self.start, self.curvature, *near)

    @torch.no_grad()
    def project(self) -> None:
        """Takes positions and zero points back to where they may be."""
        if self.position.requires_grad and self.curvature is None:
            start = self.start.float()
            bounded = torch.maximum(torch.minimum(self.position, start + self.bound), start - self.bound)
            self.position.copy_(bounded.clamp_(-MARGIN, self.largest + MARGIN))
        if self.zero.requires_grad:
            self.zero.clamp_(0, self.largest)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight as it is stored, with a byte for each integer; integers that have stayed are not copied."""
        integers = self.start
        if self.position is not self.start:
            integers = self.position.round().clamp(0, self.largest).to(torch.uint8)
        return QuantizedWeight(
            integers=integers,
            scales=stored(self._scale()).to(SCALE_DTYPE),
            zeros=self.zero.round().to(torch.int32),
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
        )

    def _scale(self) -> Tensor:
        return self.scales.float() * self.factor.exp()


class _Dequantize(torch.autograd.Function):
    """`value`; keeps none of what it computes for the backward pass."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, scale: Tensor, zero: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(position, scale, zero)
        ctx.largest = largest
        return value(position, scale, zero, largest, dtype)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        position, scale, zero = ctx.saved_tensors
        of_position, of_scale, of_zero = gradients(gradient[0], position, scale, zero, ctx.largest, needed[0])
        return of_position, of_scale if needed[1] else None, of_zero if needed[2] else None, None, None
