"""Packed modules in the place of layers, and layers in the place of packed modules."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lkq_hf.quantization.blocks import find_layers, linear_weight
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.experts import (
    expert_weights,
    install_empty_experts,
    install_experts,
    is_experts,
    packed_experts,
    projections,
    restore_experts,
    use_dense_experts,
    use_packed_experts,
)
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.packed_module import PackedModule
from lkq_hf.quantization.solve import resolve_group_size
from lkq_hf.quantization.weight import QuantizedWeight


def install_packed(block: nn.Module, name: str, weights: dict[str, QuantizedWeight]) -> None:
    """Replaces a linear layer, or the parameters of fused experts, by packed weights, on the same device.

    Args:
        block: holds the layer.
        name: the layer's, inside the block.
        weights: the block's quantized weights, by the names of `blocks.weights_of`.
    """
    module = block.get_submodule(name)
    if is_experts(module):
        install_experts(
            module,
            {
                projection: [
                    weights[f"{name}.{projection}.{expert}"] for expert in range(len(module.get_parameter(projection)))
                ]
                for projection in projections(module)
            },
        )
        return
    weight = weights[name]
    parameter = linear_weight(module)
    bias = getattr(module, "bias", None)
    home = parameter.device
    packed = QuantizedLinear.from_quantized_weight(
        QuantizedWeight(
            weight.integers.to(home),
            weight.scales.to(home),
            weight.zeros.to(home),
            weight.bits,
            weight.group_size,
            weight.sym,
        ),
        bias=None if bias is None else bias.detach(),
        dtype=parameter.dtype,
    )
    packed.replaces = type(module)
    _set_module(block, name, packed)
    module.to("meta")  # whoever still has the layer keeps no weights alive


def replace_by_packed(model: PreTrainedModel, config: TwoStageGPTQConfig) -> dict[str, PackedModule]:
    """Puts empty packed modules in the place of all that `config` selects, on the same devices.

    Returns:
        The modules by their names: one for each linear layer, and one for each projection of fused experts.
    """
    list_name, layers = find_layers(model, config)
    packed: dict[str, PackedModule] = {}
    for name, layer in layers.items():
        bits = config.bits_of(name.removeprefix(f"{list_name}."))
        if is_experts(layer):
            inputs = [expert_weights(layer, projection)[0].shape[1] for projection in projections(layer)]
            group_sizes = [resolve_group_size(in_features, config.group_size) for in_features in inputs]
            install_empty_experts(layer, bits, group_sizes, config.sym)
            packed.update({f"{name}.{key}": m for key, m in layer.named_children() if isinstance(m, PackedModule)})
            continue
        weight = linear_weight(layer)
        out_features, in_features = weight.shape
        linear = QuantizedLinear(
            in_features,
            out_features,
            bits=bits,
            group_size=resolve_group_size(in_features, config.group_size),
            sym=config.sym,
            bias=layer.bias is not None,
            dtype=weight.dtype,
            device=weight.device,
        )
        linear.replaces = type(layer)
        packed[name] = linear
        _set_module(model, name, linear)
    use_packed_experts(model)
    return packed


def restore_linear(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replaces everything packed in `model` by layers as there were, with the dequantized weights in `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            weight = module.dequantize(dtype)
            linear: nn.Linear | Conv1D
            with torch.device("meta"):
                if issubclass(module.replaces, Conv1D):
                    linear = Conv1D(module.out_features, module.in_features)
                    weight = weight.T.contiguous()
                else:
                    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight = nn.Parameter(weight)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.to(dtype))
            _set_module(model, name, linear)
        elif packed_experts(module):
            restore_experts(module, dtype)
    use_dense_experts(model)
    model.to(dtype=dtype)  # type: ignore[call-arg]  # transformers' wrapper hides nn.Module's signature
    return model


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
