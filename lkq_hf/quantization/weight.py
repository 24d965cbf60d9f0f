"""What the solver hands to packing and export: one quantized Linear weight."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A group-wise quantized weight: `w[o, k] = scales[o, g] * (integers[o, k] - zeros[o, g])`, `g = k // group_size`.

    Weights that were solved together have a leading batch dimension in all tensors.

    Args:
        integers: int32 or uint8 `[out_features, in_features]` in `0 .. 2**bits - 1`, columns in their original order.
        scales: float16 `[out_features, groups]`, finite and not 0: the values that are stored. Negative ones only in
            symmetric weights: they mirror the grid, whose lower end has one level more than its upper end.
        zeros: int32 `[out_features, groups]` in `0 .. 2**bits - 1`.
        bits: 2, 3, 4 or 8.
        group_size: input columns that share a scale; `in_features` for one scale a row.
        sym: whether every zero point is `2**(bits - 1)`.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    sym: bool

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out_features, in_features]`, computed in float32 and rounded once to `dtype`."""
        levels = self.integers.unflatten(-1, (-1, self.group_size)) - self.zeros.unsqueeze(-1)
        return (self.scales.float().unsqueeze(-1) * levels).flatten(-2).to(dtype)
