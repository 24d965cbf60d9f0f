"""A quantized weight whose scales, zero points and roundings have gradients."""

from typing import Any

import torch
from torch import Tensor, nn

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
        self.register_buffer("start", weight.integers.to(torch.uint8))
        self.register_buffer("scales", weight.scales)
        if settings.offset_rate > 0:
            position = weight.integers.float()
            if offsets is not None:
                position += offsets.float().clamp(-MARGIN, MARGIN)
            self.position = nn.Parameter(position)
        else:
            self.position = self.start
        self.factor = nn.Parameter(torch.zeros_like(weight.scales, dtype=torch.float32), settings.scale_rate > 0)
        self.zero = nn.Parameter(weight.zeros.float(), requires_grad=settings.zero_rate > 0 and not weight.sym)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, `[out, in]`."""
        scale = self.scales.float() * self.factor.exp()
        weight: Tensor = _Dequantize.apply(self.position, scale, self.zero, self.largest, self.group_size, dtype)
        return weight

    @torch.no_grad()
    def aim_at_vertex(self) -> None:
        """Turns the position's gradient into its way from the vertex: where the loss is least with all others fixed.

        With the curvature `h` of the loss in the weight, the vertex lies `-dL/dw / (h s)` grid steps from the integer.
        """
        if self.curvature is None or self.position.grad is None:
            return
        rows, columns = self.curvature
        scale = (self.scales.float() * self.factor.exp()).repeat_interleave(self.group_size, 1)
        curvature = torch.outer(rows, columns).mul_(scale.square_())
        away = self.position.grad.div_(curvature.clamp(min=torch.finfo(torch.float32).tiny)).clamp_(-1, 1)
        away.add_(self.position - self.position.round().clamp_(0, self.largest))

    @torch.no_grad()
    def project(self) -> None:
        """Takes positions and zero points back to where they may be."""
        if self.position is not self.start:
            start = self.start.float()
            bounded = torch.maximum(torch.minimum(self.position, start + self.bound), start - self.bound)
            self.position.copy_(bounded.clamp_(-MARGIN, self.largest + MARGIN))
        self.zero.clamp_(0, self.largest)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight as it is stored."""
        return QuantizedWeight(
            integers=self.position.float().round().clamp(0, self.largest).to(torch.int32),
            scales=stored(self.scales.float() * self.factor.exp()).to(SCALE_DTYPE),
            zeros=self.zero.round().to(torch.int32),
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
        )


class _Dequantize(torch.autograd.Function):
    """`scale * (round(position) - round(zero))`; keeps none of what it computes for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, position: Tensor, scale: Tensor, zero: Tensor, largest: int, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(position, scale, zero)
        ctx.largest, ctx.group_size = largest, group_size
        return _level(position, zero, largest, group_size).mul_(scale.unsqueeze(-1)).view(position.shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        position, scale, zero = ctx.saved_tensors
        gradient = gradients[0].float().reshape(*scale.shape, ctx.group_size)
        of_position = of_scale = of_zero = None
        if ctx.needs_input_grad[0]:
            of_position = (gradient * scale.unsqueeze(-1)).view(position.shape)
        if ctx.needs_input_grad[1]:
            of_scale = _level(position, zero, ctx.largest, ctx.group_size).mul_(gradient).sum(-1)
        if ctx.needs_input_grad[2]:
            of_zero = -scale * gradient.sum(-1)
        return of_position, of_scale, of_zero, None, None, None


def _level(position: Tensor, zero: Tensor, largest: int, group_size: int) -> Tensor:
    integers = position.float() if position.dtype == torch.uint8 else position.round().clamp_(0, largest)
    return integers.view(*zero.shape, group_size).sub_(zero.round().unsqueeze(-1))
