"""Experts that transformers fuses into 3-D parameters: what they hold, packing them, and running them packed.

transformers runs such a module through a registry (`transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`), and flags
on it say what its weights look like. The packed ones stand beside the parameters that they replace, under names that
no conversion of transformers' between files and models takes for the originals.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from lkq_hf.quantization.quantized_experts import QuantizedExperts
from lkq_hf.quantization.weight import QuantizedWeight

PACKED_EXPERTS = "lkq_packed"
"""Name of the packed implementation in transformers' registry."""

_PACKED = "packed_"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts in full precision that run through transformers' registry."""
    return hasattr(module, "is_transposed") and all(
        isinstance(weight := module._parameters.get(name), Tensor) and weight.dim() == 3
        for name in projections(module)
    )


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of the parameters with the experts' weights, in the order of their products."""
    return ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"), "down_proj"


def expert_weights(experts: Any, projection: str) -> list[Tensor]:
    """Each expert's weight as `[out, in]`: views of the parameter."""
    return list(_weights(experts, projection))


def _weights(experts: Any, projection: str) -> Tensor:
    weights = experts.get_parameter(projection).detach()
    return weights.transpose(1, 2) if experts.is_transposed else weights


def intermediate(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What one expert's down projection receives for tokens `x` `[tokens, hidden]`: `[tokens, intermediate]`."""
    first, _ = projections(experts)
    bias = experts.get_parameter(f"{first}_bias")[expert] if experts.has_bias else None
    return _activated(experts, nn.functional.linear(x, _weights(experts, first)[expert], bias))


def _activated(experts: Any, x: Tensor) -> Tensor:
    return experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)


def install_experts(experts: nn.Module, weights: dict[str, Sequence[QuantizedWeight]]) -> None:
    """Replaces the parameters of fused experts by packed weights, on the parameters' device.

    Args:
        weights: for each projection one weight an expert.
    """
    for projection, each in weights.items():
        parameter = experts.get_parameter(projection)
        packed = QuantizedExperts.from_quantized_weights(each, bool(experts.is_transposed), parameter.dtype)
        _replace(experts, projection, packed.to(parameter.device))


def install_empty_experts(experts: nn.Module, bits: int, group_sizes: Sequence[int], sym: bool) -> None:
    """Replaces the parameters of fused experts by packed weights that are yet to be loaded.

    Args:
        group_sizes: of each projection.
    """
    for projection, group_size in zip(projections(experts), group_sizes, strict=True):
        parameter = experts.get_parameter(projection)
        out_features, in_features = expert_weights(experts, projection)[0].shape
        packed = QuantizedExperts(
            len(parameter),
            in_features,
            out_features,
            bits=bits,
            group_size=group_size,
            sym=sym,
            transposed=bool(experts.is_transposed),
            dtype=parameter.dtype,
            device=parameter.device,
        )
        _replace(experts, projection, packed)


def _replace(experts: nn.Module, projection: str, packed: QuantizedExperts) -> None:
    delattr(experts, projection)
    experts.register_module(_PACKED + projection, packed)
    # A second name, of which state dicts know nothing, for the code of the model.
    vars(experts)[projection] = packed


def packed_experts(experts: nn.Module) -> dict[str, QuantizedExperts]:
    """The packed projections of a module by the names of the parameters that they replace; empty for other modules."""
    return {
        name.removeprefix(_PACKED): module
        for name, module in experts.named_children()
        if isinstance(module, QuantizedExperts)
    }


def restore_experts(experts: nn.Module, dtype: torch.dtype) -> None:
    """Puts the dequantized weights, in `dtype`, back as parameters."""
    for projection, packed in packed_experts(experts).items():
        weights = torch.stack([packed.dequantize(expert, dtype) for expert in range(packed.num_experts)])
        delattr(experts, _PACKED + projection)
        del vars(experts)[projection]
        weights = weights.transpose(1, 2).contiguous() if packed.transposed else weights
        experts.register_parameter(projection, nn.Parameter(weights))


def use_packed_experts(model: nn.Module) -> None:
    """Lets the experts of `model` that are packed run through `packed_experts_forward`."""
    for module in model.modules():
        if packed_experts(module):
            config: Any = module.config
            config._experts_implementation = PACKED_EXPERTS


def use_dense_experts(model: PreTrainedModel) -> None:
    """Undoes `use_packed_experts`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._experts_implementation == PACKED_EXPERTS:
            module.config._experts_implementation = model.get_correct_experts_implementation(None)


def packed_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of fused experts with packed weights, for transformers' registry.

    Modules of the same model that were left in full precision run through transformers' `grouped_mm`.

    Args:
        self: the experts.
        hidden_states: `[tokens, hidden]`.
        top_k_index: the experts of each token, int64 `[tokens, k]`.
        top_k_weights: what their results count for, `[tokens, k]`.

    Returns:
        `[tokens, hidden]`.
    """
    if not packed_experts(self):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    first, last = projections(self)
    tokens, k = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(self.num_experts, device=expert.device), right=True).int()
    x = _activated(self, _product(self, first, hidden_states[order // k], expert, ends))
    x = _product(self, last, x, expert, ends)
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return x[order.argsort()].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def _product(experts: Any, projection: str, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """Rows `x`, sorted by `expert`, times the expert's weight, with its bias if it has one."""
    y = getattr(experts, _PACKED + projection)(x, ends)
    return y + experts.get_parameter(f"{projection}_bias")[expert].to(y.dtype) if experts.has_bias else y


ALL_EXPERTS_FUNCTIONS.register(PACKED_EXPERTS, packed_experts_forward)
