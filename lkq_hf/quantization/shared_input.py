"""Packed Linears that a module applies to the same input: query, key and value; gate and up; any other by itself.

For a token or a few, all that their products do is to read the weights, and one kernel that reads them one after the
other is faster than a kernel for each. The modules stay separate ones: the first to be called computes for all, and
the others take their part if they are given the very same tensor.
"""

from torch import nn

from lkq_hf.kernels.shared_product import SharedInput
from lkq_hf.quantization.linear import QuantizedLinear

# The names that transformers' decoders give to layers of one module that share their input, in the order of calls.
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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
