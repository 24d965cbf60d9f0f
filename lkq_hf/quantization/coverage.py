"""How much of a model's linear weights a quantization covers, and what it leaves in full precision."""

from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lkq_hf.quantization.packed_module import PackedModule
from lkq_hf.quantization.quantized_experts import QuantizedExperts

MOST_NAMES = 5
"""Of what stays in full precision, in a message."""


@dataclass(frozen=True)
class Coverage:
    """What became of a model's linear weights.

    Attributes:
        quantized: number of weights that are packed.
        dense: number of weights in full precision, by the names of what holds them. Numbers of layers and experts in
            the names are `*`, so that equal places of all layers are one entry; the largest come first.
    """

    quantized: int
    dense: dict[str, int]

    @property
    def share(self) -> float:
        """The share of the weights that is packed, between 0 and 1."""
        total = self.quantized + sum(self.dense.values())
        return self.quantized / total if total else 0.0

    def __str__(self) -> str:
        """The share, and the largest of what stays in full precision."""
        covered = f"{100 * self.share:.1f} % of the linear weights are quantized"
        if not self.dense:
            return covered
        names = list(self.dense)[:MOST_NAMES]
        more = f" and {len(self.dense) - MOST_NAMES} more" if len(self.dense) > MOST_NAMES else ""
        return f"{covered}; in full precision stay {', '.join(names)}{more}"


def coverage(model: PreTrainedModel) -> Coverage:
    """Counts the matrices of a quantized model.

    Embeddings, the language model head, convolutions, and parameters that are vectors (norms, biases, decays of
    states) are no linear weights and are not counted.

    Args:
        model: with packed layers.
    """
    skipped = {id(parameter) for parameter in _not_linear(model)}
    quantized = 0
    dense: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            number = module.num_experts if isinstance(module, QuantizedExperts) else 1
            quantized += number * module.in_features * module.out_features
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            # A dimension of size 1: a vector in the shape that its use wants, or a gate of one output.
            if id(parameter) in skipped or sum(size > 1 for size in parameter.shape) < 2:
                continue
            holder = name if parameter_name == "weight" else f"{name}.{parameter_name}"
            dense[".".join("*" if part.isdigit() else part for part in holder.split("."))] += parameter.numel()
    return Coverage(quantized, dict(sorted(dense.items(), key=lambda entry: (-entry[1], entry[0]))))


def _not_linear(model: PreTrainedModel) -> list[nn.Parameter]:
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)]
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [parameter for module in (*modules, *ends) if module is not None for parameter in module.parameters()]
