"""Packed Linears that a module applies to the same input: query, key and value; gate and up; any other by itself.

For a token or a few, all that their products do is to read the weights, and one kernel that reads them one after the
other is faster than a kernel for each. The modules stay separate ones: the first to be called computes for all, and
the others take their part if they are given the very same tensor.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lkq_hf.kernels.quantized_matmul import fixed_weights
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.shared_product import SharedInput, fixed_in_thread

# The names that transformers' decoders give to layers of one module that share their input, in the order of calls.
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_handles = itertools.count()
_lock = threading.Lock()
_times_fixed: dict[int, int] = {}  # by handle, over all threads


def share_inputs(model: nn.Module) -> None:
    """Lets the packed Linears of ``model`` that share their input compute their products together."""
    for module in model.modules():
        for names in (*_SHARING, *((name,) for name, _ in module.named_children())):
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), QuantizedLinear)]
            formats = {(layer.bits, layer.group_size, layer.sym, layer.in_features) for layer in layers}
            if len(layers) == len(names) and len(formats) == 1 and all(layer.shared_input is None for layer in layers):
                shared_input = SharedInput(layers)
                for place, layer in enumerate(layers):
                    layer.shared_input, layer.place = shared_input, place


@contextmanager
def weights_fixed(model: nn.Module) -> Iterator[None]:
    """Inside, packed weights of ``model`` must not be replaced: graphs compiled inside do not take them as inputs.

    A compiled model checks each of its inputs before every call, and a packed Linear has three tensors. A handle
    stands for all of them: the same as last time if they are the same tensors.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    groups = list(dict.fromkeys(layer.shared_input for layer in layers if layer.shared_input is not None))
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
    outer, fixed_in_thread.handle = fixed_in_thread.handle, handle
    try:
        yield
    finally:
        fixed_in_thread.handle = outer
        with _lock:
            _times_fixed[handle] -= 1
            if not _times_fixed[handle]:
                del _times_fixed[handle], fixed_weights[handle]
