"""The products of packed Linears that a module applies to the same input, computed by one kernel."""

import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lkq_hf.kernels.quantized_matmul import SHARED_ROWS, RepeatedProduct, fixed_weights, quantized_matmul_fixed

if TYPE_CHECKING:
    from lkq_hf.quantization.linear import QuantizedLinear

_handles = itertools.count()
_lock = threading.Lock()
_times_fixed: dict[int, int] = {}  # by handle, over all threads


class _Thread(threading.local):
    def __init__(self) -> None:
        self.handle: int | None = None  # of the weights that are fixed in this thread


_fixed_in_thread = _Thread()


class SharedInput:
    """A few packed Linears of one format that a module applies to the same input.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: list["QuantizedLinear"]) -> None:
        self.layers = layers
        self.widths = tuple(layer.out_features for layer in layers)
        self.format = (layers[0].bits, layers[0].group_size, layers[0].sym)
        self._product = RepeatedProduct(*self.format)
        # The layers' ``fixed``, which stands for these tensors at these addresses.
        self.fixed: FixedInput | None = None
        self._fixed_tensors: list[tuple[weakref.ref[Tensor], int]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy, here or elsewhere, has weights of its own."""
        return vars(self) | {"fixed": None, "_fixed_tensors": []}

    def tensors(self) -> list[Tensor]:
        """qweight, qzeros and scales of one layer after the other."""
        # As attributes of a module they would take ten times as long, at every product.
        return [layer._buffers[name] for layer in self.layers for name in ("qweight", "qzeros", "scales")]  # type: ignore[misc]

    def compute(self, x: Tensor) -> Tensor | None:
        """Their products side by side; None if one, whose weight comes when it is called, has to do it itself."""
        tensors, device = self.tensors(), x.device
        for tensor in tensors[::3]:
            if tensor.device != device:
                return None
        return self._product(autocast(x), tensors)

    def is_on_one_device(self) -> bool:
        devices = {tensor.device for tensor in self.tensors()}
        return len(devices) == 1 and devices.pop().type != "meta"

    def fix(self, handle: int, number: int) -> None:
        """From now on, these weights are the one of this number among those that ``handle`` stands for."""
        tensors = self.tensors()
        self.fixed = FixedInput(handle, number, self.widths, str(tensors[0].device))
        self._fixed_tensors = [(weakref.ref(tensor), tensor.data_ptr()) for tensor in tensors]
        for layer in self.layers:
            layer.fixed = self.fixed

    def is_fixed_as(self, handle: int, number: int) -> bool:
        """Whether that is so, of the tensors that the layers have now."""
        return (
            self.fixed is not None
            and (self.fixed.handle, self.fixed.number) == (handle, number)
            and all(layer.fixed == self.fixed for layer in self.layers)
            and all(
                reference() is tensor and address == tensor.data_ptr()
                for tensor, (reference, address) in zip(self.tensors(), self._fixed_tensors, strict=True)
            )
        )


class FixedInput(NamedTuple):
    """A `SharedInput` whose weights stay where they are, for graphs that do not take them as inputs.

    Before each call a compiled graph checks all that it has seen of a module. Where that is immutable, as it is here,
    torch 2.11 checks no more than whether an attribute was set.
    """

    handle: int
    number: int
    widths: tuple[int, ...]
    device: str

    def holds_for(self, x: Tensor) -> bool:
        """Whether this thread is inside of ``weights_fixed``, and the weights have not moved to another device."""
        return self.handle == _fixed_in_thread.handle and x.device == torch.device(self.device)

    def compute(self, x: Tensor) -> Tensor:
        """The products side by side."""
        return quantized_matmul_fixed(autocast(x), self.handle, self.number, sum(self.widths))


@contextmanager
def weights_fixed(model: nn.Module) -> Iterator[None]:
    """Inside, packed weights of ``model`` must not be replaced: graphs compiled inside do not take them as inputs.

    A compiled model checks each of its inputs before every call, and a packed Linear has three tensors. A handle
    stands for all of them: the same as last time if they are the same tensors.
    """
    shared = (getattr(module, "shared_input", None) for module in model.modules())
    groups = list(dict.fromkeys(each for each in shared if isinstance(each, SharedInput)))
    if not groups or not all(group.is_on_one_device() for group in groups):
        yield
        return
    with _lock:
        handle = None if groups[0].fixed is None else groups[0].fixed.handle
        if handle is None or not all(group.is_fixed_as(handle, number) for number, group in enumerate(groups)):
            handle = next(_handles)
            for number, group in enumerate(groups):
                group.fix(handle, number)
        _times_fixed[handle] = _times_fixed.get(handle, 0) + 1
        fixed_weights[handle] = [(group.tensors(), *group.format) for group in groups]
    outer, _fixed_in_thread.handle = _fixed_in_thread.handle, handle
    try:
        yield
    finally:
        _fixed_in_thread.handle = outer
        with _lock:
            _times_fixed[handle] -= 1
            if not _times_fixed[handle]:
                del _times_fixed[handle], fixed_weights[handle]


class _Computed:
    """Products that the layers after the first one have yet to take: of what, of which input, and they."""

    def __init__(self) -> None:
        self.products: tuple[SharedInput | FixedInput, Tensor, tuple[Tensor, ...]] | None = None


_computed = _Computed()


def shared_product(layer: "QuantizedLinear", x: Tensor) -> Tensor | None:
    """The product of ``layer``, without bias; None if it has to be computed for this layer alone."""
    # Only compiled graphs gain by fixed weights.
    fixed = layer.fixed if torch.compiler.is_compiling() else None
    shared = fixed if fixed is not None and fixed.holds_for(x) else layer.shared_input
    if shared is None:
        return None
    if layer.place == 0:
        few_rows = 0 < x.numel() <= SHARED_ROWS * x.shape[-1]
        y = shared.compute(x) if few_rows and not (torch.is_grad_enabled() and x.requires_grad) else None
        if len(shared.widths) == 1:
            return y
        _computed.products = None if y is None else (shared, x, y.split_with_sizes(shared.widths, -1))
    computed = _computed.products
    if computed is None or computed[0] != shared or computed[1] is not x:  # another thread's, perhaps
        return None
    if layer.place == len(shared.widths) - 1:
        _computed.products = None
    return computed[2][layer.place]


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of the autocast region around, if there is one."""
    if x.is_meta:  # of which torch knows no autocast
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
