"""The packed Linear: a drop-in for `torch.nn.Linear` whose weight is in the GPTQ layout."""

from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from lkq_hf.kernels.dequantize import dequantize
from lkq_hf.kernels.quantized_matmul import RepeatedProduct, quantized_matmul
from lkq_hf.kernels.shared_product import FixedInput, SharedInput, autocast, shared_product
from lkq_hf.quantization.packed_module import PackedModule
from lkq_hf.quantization.packing import group_index, pack_weight, packed_shapes, unpack_weight
from lkq_hf.quantization.weight import QuantizedWeight


class QuantizedLinear(PackedModule, nn.Linear):
    """`y = x w^T + bias` with a group-wise quantized `w` (see `lkq_hf.quantization.packing` for its tensors).

    It is an `nn.Linear` to whoever asks, so that PEFT puts LoRA on it with an ordinary `LoraConfig`; gradients reach
    the input. Its `weight` is None: LoRA cannot be merged into packed integers, and PEFT's `merge` fails rather than
    lose the update. The scales stay float16 under `.to(dtype)`, since they are part of the stored format; the output
    has the input's dtype.

    Args:
        in_features: a multiple of 32.
        out_features: a multiple of 32.
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale; divides `in_features`. `in_features` for one scale a row.
        sym: whether every zero point is `2**(bits - 1)`.
        bias: whether there is a bias.
        dtype: of the bias.
        device: of all buffers; their content is uninitialized until a state dict is loaded.

    Raises:
        ValueError: the sizes do not pack.
    """

    g_idx: Tensor

    replaces: type[nn.Module] = nn.Linear
    """The class of the layer in whose place this one stands."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        sym: bool,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.sym = sym
        # What computes this product together with those of the same input, the place among them, and what stands for
        # it in compiled graphs.
        self.shared_input: SharedInput | None = None
        self.place = 0
        self.fixed: FixedInput | None = None
        self._product = RepeatedProduct(bits, group_size, sym)
        self.register_parameter("weight", None)
        for name, (shape, buffer_dtype) in self._shapes().items():
            self.register_buffer(name, torch.empty(shape, dtype=buffer_dtype, device=device))
        if bias:
            self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device))
        else:
            # An ordinary attribute, for which a compiled model checks less.
            self.bias = None  # type: ignore[assignment]

    @classmethod
    def from_quantized_weight(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Pack `weight`; `bias` (`[out_features]`) is stored in `dtype`, by default its own."""
        out_features, in_features = weight.integers.shape
        module = cls(
            in_features,
            out_features,
            bits=weight.bits,
            group_size=weight.group_size,
            sym=weight.sym,
            bias=bias is not None,
            device="meta",
        )
        for name, tensor in pack_weight(weight).items():
            setattr(module, name, tensor)
        if bias is not None:
            module.register_buffer("bias", bias.detach().to(device=weight.integers.device, dtype=dtype or bias.dtype))
        return module

    def forward(self, x: Tensor) -> Tensor:
        y = shared_product(self, x)
        if y is None:
            x, weight = autocast(x), [self.qweight, self.qzeros, self.scales]
            if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
                y = quantized_matmul(x, *weight, self.bits, self.group_size, self.sym)
            else:
                y = self._product(x, weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"fixed": None}  # which stands for this module's tensors, and not for a copy's

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out_features, in_features]`, computed in float32 and rounded once to `dtype`."""
        weight = dequantize(self.qweight, self.qzeros, self.scales, self.bits, self.group_size, self.sym, dtype)
        return weight.t().contiguous()

    def quantized_weight(self) -> QuantizedWeight:
        """The unpacked integers, scales and zero points: the inverse of `from_quantized_weight`."""
        return unpack_weight(
            self.qweight, self.qzeros, self.scales, bits=self.bits, group_size=self.group_size, sym=self.sym
        )

    def validate(self) -> None:
        """Checks loaded tensors against the configuration that this module was made from.

        Raises:
            ValueError: a tensor has the wrong shape or dtype, `g_idx` is not `k // group_size`, scales are not finite,
                0, or negative in asymmetric weights, or symmetric weights have other zero points than `2**(bits - 1)`.
        """
        super().validate()
        if self.bias is not None and tuple(self.bias.shape) != (self.out_features,):
            raise ValueError(f"bias should be [{self.out_features}], found {list(self.bias.shape)}. {self._advice}")
        if not self.g_idx.is_meta and not torch.equal(
            self.g_idx, group_index(self.in_features, self.group_size, self.g_idx.device)
        ):
            raise ValueError(
                "g_idx should be k // group_size; groups of columns that are not neighbors (act-order, desc_act) "
                f"cannot be read. {self._advice}"
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, sym={self.sym}, bias={self.bias is not None}"
        )

    def reset_parameters(self) -> NoReturn:
        raise NotImplementedError("A QuantizedLinear is filled from a QuantizedWeight or a state dict.")

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return packed_shapes(self.in_features, self.out_features, self.bits, self.group_size)
