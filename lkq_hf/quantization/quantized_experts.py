"""The packed weights of all experts of a layer: one tensor for each part of the GPTQ layout."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from lkq_hf.kernels.dequantize import dequantize
from lkq_hf.kernels.quantized_grouped_matmul import quantized_grouped_matmul
from lkq_hf.kernels.shared_product import autocast
from lkq_hf.quantization.packed_module import PackedModule
from lkq_hf.quantization.packing import pack_weight, packed_shapes, unpack_weight
from lkq_hf.quantization.weight import QuantizedWeight

PACKED_TENSORS = ("qweight", "qzeros", "scales")


class QuantizedExperts(PackedModule):
    """One projection of fused experts, `y = x w[e]^T` with a group-wise quantized `w[e]` for each expert `e`.

    `qweight`, `qzeros` and `scales` are those of `lkq_hf.quantization.packing` for every expert, stacked in a
    first dimension. `g_idx`, which says nothing that `group_size` does not, is left out.

    Args:
        num_experts: number of experts.
        in_features: a multiple of 32.
        out_features: a multiple of 32.
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale; divides `in_features`.
        sym: whether every zero point is `2**(bits - 1)`.
        transposed: whether the parameter in whose place this module stands is `[experts, in, out]`.
        dtype: of that parameter.
        device: of all buffers; their content is uninitialized until a state dict is loaded.

    Raises:
        ValueError: the sizes do not pack.
    """

    # transformers initializes the parameter that stood here, unless this says that it has been.
    _is_hf_initialized = True

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        sym: bool,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.sym = sym
        self.transposed = transposed
        self.dtype = dtype
        for name, (shape, buffer_dtype) in self._shapes().items():
            self.register_buffer(name, torch.empty(shape, dtype=buffer_dtype, device=device))

    @classmethod
    def from_quantized_weights(
        cls, weights: Sequence[QuantizedWeight], transposed: bool = False, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Packs one weight for each expert."""
        first = weights[0]
        out_features, in_features = first.integers.shape
        module = cls(
            len(weights),
            in_features,
            out_features,
            bits=first.bits,
            group_size=first.group_size,
            sym=first.sym,
            transposed=transposed,
            dtype=dtype,
            device="meta",
        )
        packed = [pack_weight(weight) for weight in weights]
        for name in PACKED_TENSORS:
            setattr(module, name, torch.stack([tensors[name] for tensors in packed]))
        return module

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """The product for rows sorted by expert (see `quantized_grouped_matmul`).

        Args:
            x: `[rows, in_features]`.
            ends: int32 `[experts]`, where each expert's rows end.
        """
        return quantized_grouped_matmul(
            autocast(x), ends, self.qweight, self.qzeros, self.scales, self.bits, self.group_size, self.sym
        )

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """One expert's weight in the orientation and dtype of the parameter that stood here.

        It is all that the loops over experts in transformers' models ask for, so that they run too
        (`experts_implementation="eager"`).
        """
        weight = self.dequantize(int(expert), self.dtype)
        return weight.t() if self.transposed else weight

    def dequantize(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An expert's weight `[out_features, in_features]`, computed in float32 and rounded once to `dtype`."""
        tensors = (self.qweight[expert], self.qzeros[expert], self.scales[expert])
        return dequantize(*tensors, self.bits, self.group_size, self.sym, dtype).t().contiguous()

    def quantized_weight(self, expert: int) -> QuantizedWeight:
        """An expert's unpacked integers, scales and zero points."""
        tensors = (self.qweight[expert], self.qzeros[expert], self.scales[expert])
        return unpack_weight(*tensors, bits=self.bits, group_size=self.group_size, sym=self.sym)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size}, sym={self.sym}"
        )

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = packed_shapes(self.in_features, self.out_features, self.bits, self.group_size)
        return {name: ((self.num_experts, *shapes[name][0]), shapes[name][1]) for name in PACKED_TENSORS}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        return super()._apply(fn, recurse)
