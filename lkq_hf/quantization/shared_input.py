"""Packed Linears that a module applies to the same input: query, key and value; gate and up.

For a token or a few, all that their products do is to read the weights, and one kernel that reads them one after the
other is faster than a kernel for each. The modules stay separate ones: the first to be called computes for all, and
the others take their part if they are given the very same tensor.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lkq_hf.kernels.quantized_matmul import SHARED_ROWS, quantized_matmul_shared

if TYPE_CHECKING:
    from lkq_hf.quantization.linear import QuantizedLinear

# The names that transformers' decoders give to layers of one module that share their input, in the order of calls.
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedInput:
    """The products of a few packed Linears, of one format and number of input features, with the same input.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: list["QuantizedLinear"]) -> None:
        self._layers = layers
        # The input and each layer's product, from the first layer's call to the last one's.
        self._computed: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def product(self, place: int, x: Tensor) -> Tensor | None:
        """That of the layer at ``place``, without bias; None if it has to be computed for this layer alone."""
        if place == 0:
            self._computed = (x, self._compute(x)) if self._can_compute(x) else None
        computed = self._computed
        if computed is None or computed[0] is not x:  # another thread's, perhaps
            return None
        if place == len(self._layers) - 1:
            self._computed = None
        return computed[1][place]

    def _can_compute(self, x: Tensor) -> bool:
        return (
            0 < x.numel() <= SHARED_ROWS * x.shape[-1]
            and not (torch.is_grad_enabled() and x.requires_grad)
            # A layer whose weight is elsewhere until it is called (offloading) computes for itself.
            and all(layer.qweight.device == x.device for layer in self._layers)
        )

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        layers, first = self._layers, self._layers[0]
        y = quantized_matmul_shared(
            autocast(x),
            [layer.qweight for layer in layers],
            [layer.qzeros for layer in layers],
            [layer.scales for layer in layers],
            first.bits,
            first.group_size,
            first.sym,
        )
        return y.split([layer.out_features for layer in layers], -1)


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of the autocast region around, if there is one."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def share_inputs(model: nn.Module) -> None:
    """Lets the packed Linears of ``model`` that share their input compute their products together."""
    from lkq_hf.quantization.linear import QuantizedLinear

    for module in model.modules():
        for names in _SHARING:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), QuantizedLinear)]
            formats = {(layer.bits, layer.group_size, layer.sym, layer.in_features) for layer in layers}
            if len(layers) == len(names) and len(formats) == 1:
                shared_input = SharedInput(layers)
                for place, layer in enumerate(layers):
                    layer.shared_input = shared_input, place
