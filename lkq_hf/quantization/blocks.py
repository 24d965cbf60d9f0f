"""What in a model is quantized: its repeated decoder blocks, the linear layers and the fused experts inside them."""

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.experts import expert_weights, is_experts, projections
from lkq_hf.quantization.packing import packed_shapes
from lkq_hf.quantization.solve import resolve_group_size


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer: `nn.Linear`, or GPT-2's `Conv1D`, whose weight lies transposed."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as `[out, in]`; for `Conv1D` a transposed view."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def weights_of(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer to quantize, as `[out, in]` views: one of a linear layer, two an expert of fused experts.

    The name of an expert's weight is the layer's name, the projection's, and the expert's number, with dots between.
    """
    if not is_experts(layer):
        return {name: linear_weight(layer)}
    return {
        f"{name}.{projection}.{expert}": weight
        for projection in projections(layer)
        for expert, weight in enumerate(expert_weights(layer, projection))
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name is, contains or lies under one of `patterns`, compared by whole components."""
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def find_blocks(model: nn.Module, block_name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The list of repeated blocks: the outermost `nn.ModuleList` with the most weights in linear layers.

    Args:
        block_name: its dotted name, where the structure should not decide.

    Raises:
        ValueError: no such list, or a name that is not one.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if block_name is not None:
        # A checkpoint of a model with a head may be loaded without it, and the other way round.
        base = getattr(model, "base_model_prefix", "")
        for name in (block_name, block_name.removeprefix(f"{base}."), f"{base}.{block_name}"):
            if name in lists:
                return name, lists[name]
        raise ValueError(f"block_name_to_quantize={block_name!r} is no module list; the model has {sorted(lists)}")
    outermost = {
        name: blocks for name, blocks in lists.items() if not any(name.startswith(f"{other}.") for other in lists)
    }
    sizes = {name: _size(blocks) for name, blocks in outermost.items()}
    if not sizes or not max(sizes.values()):
        raise ValueError(
            "found no list of blocks with linear layers; name it with block_name_to_quantize of advanced="
        )
    largest = max(sizes, key=lambda name: sizes[name])
    return largest, outermost[largest]


def _size(blocks: nn.ModuleList) -> int:
    # Every parameter, not only those of linear layers: the experts of a mixture are fused into plain 3D parameters.
    return sum(parameter.numel() for parameter in blocks.parameters() if parameter.dim() >= 2)


def find_layers(model: PreTrainedModel, config: TwoStageGPTQConfig) -> tuple[str, dict[str, nn.Module]]:
    """The block list and the layers that `config` selects in `model` (see `layers_to_quantize`).

    Raises:
        ValueError: as there, or `layer_bits` names something else than a layer.
    """
    list_name, layers = layers_to_quantize(
        model,
        config.bits,
        config.group_size,
        config.block_name_to_quantize,
        config.modules_in_block_to_quantize,
        config.modules_to_not_convert or (),
    )
    if unknown := sorted(set(config.layer_bits) - {name.removeprefix(f"{list_name}.") for name in layers}):
        raise ValueError(
            f"layer_bits names {unknown[0]!r}, which is no layer that is quantized: expected names inside "
            f"{list_name}, such as {next(iter(layers)).removeprefix(f'{list_name}.')!r}"
        )
    return list_name, layers


def layers_to_quantize(
    model: PreTrainedModel,
    bits: int,
    group_size: int,
    block_name: str | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> tuple[str, dict[str, nn.Module]]:
    """The linear layers and fused experts inside the blocks, by their full names, in module order.

    Calibration and loading both ask this function, so a checkpoint's config alone decides what is packed.

    Args:
        include: names inside a block to quantize (`modules_in_block_to_quantize`); `None` for everything.
        exclude: names to leave alone (`modules_to_not_convert`).

    Returns:
        The name of the block list, and the layers.

    Raises:
        ValueError: no list of blocks or no layer is found; weights that would silently stay out (experts of an unknown
            kind); blocks or layers that share one weight; sizes that no group fits or that do not pack.
    """
    exclude = list(exclude)
    list_name, blocks = find_blocks(model, block_name)
    first_name: dict[int, str] = {}
    shared: dict[str, str] = {}
    layers: dict[str, nn.Module] = {}
    # remove_duplicate=False: a block that stands in the list twice must be seen twice to be refused.
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(f"{list_name}.") or matches(name, exclude):
            continue
        if not is_linear(module) and not is_experts(module):
            continue
        if include is not None and not matches(name.removeprefix(f"{list_name}."), include):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            other = first_name.setdefault(id(parameter), name)
            if other != name:
                reason = f"{other} and {name} share one weight, which cannot be quantized for two places."
                shared.setdefault(inside_block(list_name, name), reason)
                shared.setdefault(inside_block(list_name, other), "")
        layers[name] = module
    problems = {
        **shared,
        **_unknown_matrices(list_name, blocks, layers, exclude),
        **_sizes_that_do_not_pack(list_name, layers, bits, group_size),
    }
    if problems:
        raise ValueError(
            f"not every layer can be quantized with bits={bits} and group_size={group_size}. "
            f"{' '.join(filter(None, problems.values()))} To leave them in full precision and quantize the rest, pass "
            f"modules_to_not_convert={sorted({*exclude, *problems})}"
        )
    if not layers:
        others = {type(m).__name__ for m in blocks.modules() if isinstance(m, nn.Linear) and not is_linear(m)}
        why = f"; {', '.join(sorted(others))} may compute something else than nn.Linear does" if others else ""
        raise ValueError(
            f"no linear layer of {list_name} is left to quantize, expected nn.Linear or Conv1D{why}; look at "
            f"modules_in_block_to_quantize={include} and modules_to_not_convert={exclude}"
        )
    embeddings = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    for name, module in layers.items():
        if is_linear(module) and id(module.get_parameter("weight")) in embeddings:
            raise ValueError(f"{name} shares its weight with an embedding; leave it out with modules_to_not_convert")
    return list_name, layers


def check_names(model: PreTrainedModel, include: Iterable[str] | None, exclude: Iterable[str] | None) -> None:
    """Refuses names that match nothing: a misspelt one would silently change what is quantized.

    Raises:
        ValueError: a name of `modules_in_block_to_quantize` or `modules_to_not_convert` is not the model's.
    """
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for field, patterns in (("modules_in_block_to_quantize", include), ("modules_to_not_convert", exclude)):
        for pattern in patterns or ():
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(f"{field} names {pattern!r}, which matches no module of the model")


def inside_block(list_name: str, name: str) -> str:
    """A name without the list of blocks and the block's number: what one writes into `modules_to_not_convert`."""
    return name.removeprefix(f"{list_name}.").partition(".")[2]


def _sizes_that_do_not_pack(
    list_name: str, layers: dict[str, nn.Module], bits: int, group_size: int
) -> dict[str, str]:
    """Why layers cannot be packed, by their names inside a block."""
    problems: dict[str, str] = {}
    for name, layer in layers.items():
        for weight in {weight.shape: weight for weight in weights_of(name, layer).values()}.values():
            out_features, in_features = weight.shape
            try:
                packed_shapes(in_features, out_features, bits, resolve_group_size(in_features, group_size))
            except ValueError as error:
                problems.setdefault(inside_block(list_name, name), f"{name}: {error}")
    return problems


def _unknown_matrices(
    list_name: str, blocks: nn.ModuleList, layers: dict[str, nn.Module], exclude: list[str]
) -> dict[str, str]:
    """Matrices in plain parameters that would silently stay in full precision, by their names inside a block.

    A router's matrix is a plain parameter too: those of two dimensions are left alone, unless they are most of the
    weights, as DBRX's experts are. `coverage` counts them.
    """
    several: dict[str, int] = {}
    single: dict[str, int] = {}
    for module_name, module in blocks.named_modules():
        name = f"{list_name}.{module_name}"
        known = isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) or is_linear(module)
        if known or is_experts(module) or name in layers:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}"
            # Convolutions and decays of state-space models have dimensions of size 1.
            if parameter.dim() < 2 or 1 in parameter.shape[-2:] or matches(full_name, exclude):
                continue
            (several if parameter.dim() > 2 else single)[full_name] = parameter.numel()
    quantized = sum(weight.numel() for name, layer in layers.items() for weight in weights_of(name, layer).values())
    if sum(single.values()) <= quantized:
        single = {}
    problems: dict[str, str] = {}
    for name, size in {**several, **single}.items():
        holder = name.rpartition(".")[0]
        # All that a module holds, unless it has layers that can be quantized.
        left_out = name if any(layer.startswith(f"{holder}.") for layer in layers) else holder
        problems.setdefault(
            inside_block(list_name, left_out),
            f"{name} ({size} weights) holds several matrices in one tensor, as experts do, but does not run through "
            "transformers' registry of experts implementations.",
        )
    return problems
