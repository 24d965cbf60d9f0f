"""What in a model is quantised: its repeated decoder blocks and the linear layers inside them, found by structure."""

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lkq_hf.quantization.packing import packed_shapes
from lkq_hf.quantization.solve import resolve_group_size


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer: `nn.Linear`, or GPT-2's `Conv1D`, whose weight lies transposed."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as `[out, in]`; for `Conv1D` a transposed view."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


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
        raise ValueError("found no list of blocks with linear layers; name it with block_name_to_quantize")
    largest = max(sizes, key=lambda name: sizes[name])
    return largest, outermost[largest]


def _size(blocks: nn.ModuleList) -> int:
    # Every parameter, not only those of linear layers: the experts of a mixture are fused into plain 3D parameters.
    return sum(parameter.numel() for parameter in blocks.parameters() if parameter.dim() >= 2)


def layers_to_quantize(
    model: PreTrainedModel,
    bits: int,
    group_size: int,
    block_name: str | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> tuple[str, dict[str, nn.Module]]:
    """The linear layers inside the blocks, by their full names, in module order.

    Calibration and loading both ask this function, so a checkpoint's config alone decides what is packed.

    Args:
        include: names inside a block to quantise (`modules_in_block_to_quantize`); `None` for all linear layers.
        exclude: names to leave alone (`modules_to_not_convert`).

    Returns:
        The name of the block list, and the layers.

    Raises:
        ValueError: no list of blocks or no layer is found; weights that would silently stay out (fused experts);
            blocks or layers that share one weight; sizes that no group fits or that do not pack.
    """
    exclude = list(exclude)
    list_name, blocks = find_blocks(model, block_name)
    _refuse_fused_experts(list_name, blocks, exclude)
    first_name: dict[int, str] = {}
    layers: dict[str, nn.Module] = {}
    # remove_duplicate=False: a block that stands in the list twice must be seen twice to be refused.
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(f"{list_name}.") or not is_linear(module) or matches(name, exclude):
            continue
        if include is not None and not matches(name.removeprefix(f"{list_name}."), include):
            continue
        weight = module.get_parameter("weight")
        if id(weight) in first_name:
            raise ValueError(
                f"{first_name[id(weight)]} and {name} share one weight, which cannot be quantised for two places; "
                "leave both out with modules_to_not_convert"
            )
        first_name[id(weight)] = name
        try:
            out_features, in_features = linear_weight(module).shape
            packed_shapes(in_features, out_features, bits, resolve_group_size(in_features, group_size))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        layers[name] = module
    if not layers:
        others = {type(m).__name__ for m in blocks.modules() if isinstance(m, nn.Linear) and not is_linear(m)}
        why = f"; {', '.join(sorted(others))} may compute something else than nn.Linear does" if others else ""
        raise ValueError(
            f"no linear layer of {list_name} is left to quantise, expected nn.Linear or Conv1D{why}; look at "
            f"modules_in_block_to_quantize={include} and modules_to_not_convert={exclude}"
        )
    embeddings = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    for name, module in layers.items():
        if id(module.get_parameter("weight")) in embeddings:
            raise ValueError(f"{name} shares its weight with an embedding; leave it out with modules_to_not_convert")
    return list_name, layers


def check_names(model: PreTrainedModel, include: Iterable[str] | None, exclude: Iterable[str] | None) -> None:
    """Refuses names that match nothing: a misspelt one would silently change what is quantised.

    Raises:
        ValueError: a name of `modules_in_block_to_quantize` or `modules_to_not_convert` is not the model's.
    """
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for field, patterns in (("modules_in_block_to_quantize", include), ("modules_to_not_convert", exclude)):
        for pattern in patterns or ():
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(f"{field} names {pattern!r}, which matches no module of the model")


def _refuse_fused_experts(list_name: str, blocks: nn.ModuleList, exclude: list[str]) -> None:
    fused = [
        f"{list_name}.{module_name}.{name}"
        for module_name, module in blocks.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 3 and not isinstance(module, nn.modules.conv._ConvNd)
    ]
    fused = [name for name in fused if not matches(name, exclude)]
    if fused:
        raise ValueError(
            f"{fused[0]} ({len(fused)} such parameters) holds several matrices in one tensor, as fused experts do; "
            "these are not quantised. To quantise the rest of the model and keep them as they are, pass "
            f"modules_to_not_convert=[{fused[0].split('.', list_name.count('.') + 2)[-1].rpartition('.')[0]!r}]"
        )
