"""Packed Linears that a module applies to the same input: query, key and value; gate and up; any other by itself.

For a token or a few, all that their products do is to read the weights, and one kernel that reads them one after the
other is faster than a kernel for each. The modules stay separate ones: the first to be called computes for all, and
the others take their part if they are given the very same tensor.
"""

import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lkq_hf.kernels.quantized_matmul import (
    SHARED_ROWS,
    fixed_weights,
    quantized_matmul_fixed,
    quantized_matmul_shared,
)

if TYPE_CHECKING:
    from lkq_hf.quantization.linear import QuantizedLinear

# The names that transformers' decoders give to layers of one module that share their input, in the order of calls.
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_handles = itertools.count()
_lock = threading.Lock()


class SharedInput:
    """The products of a few packed Linears, of one format and number of input features, with the same input.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: list["QuantizedLinear"]) -> None:
        self._layers = layers
        self._widths = [layer.out_features for layer in layers]
        # The input and each layer's product, from the first layer's call to the last one's.
        self._computed: tuple[Tensor, tuple[Tensor, ...]] | None = None
        # While weights are fixed, what stands for them and where they are; and for which weights it stood last.
        self._handle: int | None = None
        self._device: torch.device | None = None
        self._last_handle = -1
        self._last_weights: list[tuple[weakref.ref[Tensor], int]] = []
        self._times_fixed = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy, here or elsewhere, has weights of its own."""
        return vars(self) | {"_computed": None, "_handle": None, "_last_weights": [], "_times_fixed": 0}

    def product(self, place: int, x: Tensor) -> Tensor | None:
        """That of the layer at ``place``, without bias; None if it has to be computed for this layer alone."""
        if place == 0:
            self._computed = (x, self._compute(x)) if self._can_compute(x) else None
        computed = self._computed
        if computed is None or computed[0] is not x:  # another thread's, perhaps
            return None
        if place == len(self._widths) - 1:
            self._computed = None
        return computed[1][place]

    def _can_compute(self, x: Tensor) -> bool:
        return (
            0 < x.numel() <= SHARED_ROWS * x.shape[-1]
            and not (torch.is_grad_enabled() and x.requires_grad)
            # A layer whose weight is elsewhere until it is called (offloading) computes for itself.
            and (self._is_fixed(x) or all(layer.qweight.device == x.device for layer in self._layers))
        )

    def _is_fixed(self, x: Tensor) -> bool:
        """Whether a handle stands for the weights, and they have not moved to another device since.

        Only compiled graphs gain by it. In other forwards, handles are another thread's, which may end at any time.
        """
        return torch.compiler.is_compiling() and self._handle is not None and self._device == x.device

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        if self._is_fixed(x):
            y = quantized_matmul_fixed(autocast(x), self._handle, sum(self._widths))
        else:
            qweights, qzeros, scales = (list(tensors) for tensors in zip(*self._weights(), strict=True))
            first = self._layers[0]
            y = quantized_matmul_shared(autocast(x), qweights, qzeros, scales, first.bits, first.group_size, first.sym)
        return y.split(self._widths, -1)

    def _weights(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(layer.qweight, layer.qzeros, layer.scales) for layer in self._layers]

    def _are_the_last(self, tensors: list[Tensor]) -> bool:
        return len(self._last_weights) == len(tensors) and all(
            reference() is tensor and address == tensor.data_ptr()
            for tensor, (reference, address) in zip(tensors, self._last_weights, strict=True)
        )

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Inside, a handle stands for the weights: the same as last time if they are the same tensors."""
        tensors = list(itertools.chain.from_iterable(self._weights()))
        device = tensors[0].device
        if device.type == "meta" or any(tensor.device != device for tensor in tensors):
            yield
            return
        first = self._layers[0]
        with _lock:
            self._times_fixed += 1
            if self._times_fixed == 1:
                if not self._are_the_last(tensors):
                    self._last_handle = next(_handles)
                    self._last_weights = [(weakref.ref(tensor), tensor.data_ptr()) for tensor in tensors]
                self._handle, self._device = self._last_handle, device
                fixed_weights[self._handle] = (*tensors, first.bits, first.group_size, first.sym)
        try:
            yield
        finally:
            with _lock:
                self._times_fixed -= 1
                if self._times_fixed == 0:
                    del fixed_weights[self._last_handle]
                    self._handle = None


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of the autocast region around, if there is one."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def share_inputs(model: nn.Module) -> None:
    """Lets the packed Linears of ``model`` that share their input compute their products together."""
    from lkq_hf.quantization.linear import QuantizedLinear

    for module in model.modules():
        for names in (*_SHARING, *((name,) for name, _ in module.named_children())):
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), QuantizedLinear)]
            formats = {(layer.bits, layer.group_size, layer.sym, layer.in_features) for layer in layers}
            if len(layers) == len(names) and len(formats) == 1 and all(layer.shared_input is None for layer in layers):
                shared_input = SharedInput(layers)
                for place, layer in enumerate(layers):
                    layer.shared_input = shared_input, place


@contextmanager
def weights_fixed(model: nn.Module) -> Iterator[None]:
    """Inside, packed weights of ``model`` must not be replaced: graphs compiled inside do not take them as inputs.

    A compiled model checks each of its inputs before every call, and a packed Linear has three tensors.
    """
    from lkq_hf.quantization.linear import QuantizedLinear

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, QuantizedLinear) and module.shared_input is not None:
                shared_input, place = module.shared_input
                if place == 0:
                    stack.enter_context(shared_input.fixed())
        yield
