"""What the files of a quantized checkpoint hold, compared with what its configuration expects."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.install import replace_by_packed
from lkq_hf.quantization.packed_module import PackedModule

SAFETENSORS_DTYPES = {torch.int32: "I32", torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}

Headers = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type, by safetensors' name for it, of each tensor of a checkpoint."""


def tensor_headers(files: Iterable[str | Path]) -> Headers:
    """What safetensors files say of their tensors.

    Raises:
        ValueError: a file is damaged.
    """
    headers: Headers = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # not a dict
                    header = file.get_slice(key)
                    headers[key] = (tuple(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated ({error}); download or write it again") from error
    return headers


def packed_model(directory: Path, config: TwoStageGPTQConfig, headers: Headers) -> PreTrainedModel:
    """The model of a checkpoint of ours on the meta device, with packed layers, compared with its files.

    Raises:
        ValueError: files and configuration disagree (`check_checkpoint`).
    """
    model_config = AutoConfig.from_pretrained(directory)
    del model_config.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config)
    check_checkpoint(model, replace_by_packed(model, config), headers)
    return model


def check_checkpoint(model: PreTrainedModel, packed: dict[str, PackedModule], headers: Headers) -> None:
    """Compares the tensors of a checkpoint with what the configuration expects, before anything is loaded.

    Transformers only warns about missing tensors, and would go on with whatever was in memory.

    Args:
        model: with its packed layers in place.
        packed: those layers (`replace_by_packed`).
        headers: of the checkpoint's files (`tensor_headers`).

    Raises:
        ValueError: a tensor of the language model is missing or has another shape or type, or a layer is packed in the
            files and not in the configuration.
    """
    found = {name: headers[key] for key, name in names_in_model(model, headers).items()}
    base = model.base_model_prefix

    def look_up(key: str) -> tuple[tuple[int, ...], str]:
        # One of model and checkpoint may have the prefix, and the other not.
        for name in (key, f"{base}.{key}", key.removeprefix(f"{base}.")):
            if name in found:
                return found[name]
        raise ValueError(
            f"the checkpoint has no {key}: it is incomplete, or its config.json (bits, group_size, "
            "modules_to_not_convert) belongs to another one"
        )

    for name, module in packed.items():
        for buffer, tensor in module.named_buffers():
            expected = (tuple(tensor.shape), SAFETENSORS_DTYPES.get(tensor.dtype))
            key = f"{name}.{buffer}"
            actual = look_up(key)
            if actual[0] != expected[0] or (buffer != "bias" and actual[1] != expected[1]):
                raise ValueError(
                    f"{key} has shape {list(actual[0])} and type {actual[1]}, but config.json (bits="
                    f"{module.bits}, group_size={module.group_size}) implies {list(expected[0])} and {expected[1]}"
                )
    known = {name.removeprefix(f"{base}.") for name in packed}
    for key in found:
        layer, _, tensor_name = key.rpartition(".")
        if tensor_name == "qweight" and layer.removeprefix(f"{base}.") not in known:
            raise ValueError(
                f"the checkpoint holds packed weights of {layer}, which config.json (modules_to_not_convert, "
                "modules_in_block_to_quantize) says is not quantized: it belongs to another checkpoint"
            )
    if any(isinstance(change, WeightConverter) for change in get_model_conversion_mapping(model, add_legacy=False)):
        return  # some of the model's tensors are put together from several
    for key in _dense_names(model):
        if not look_up(key)[1].startswith(("F", "BF")):
            raise ValueError(f"{key} should hold floating-point numbers, found {look_up(key)[1]}")


def names_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Under which name in `model` transformers loads each tensor of a checkpoint."""
    changes = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    names = {}
    for key in sorted(keys):  # as transformers does: some renamings depend on what came before
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        names[key] = name
    return names


def _dense_names(model: PreTrainedModel) -> list[str]:
    """Parameters of the language model that are not packed; those of another head may be new."""
    base, head = model.base_model, model.get_output_embeddings()
    inside = {id(parameter) for module in (base, head) if module is not None for parameter in module.parameters()}
    tied = set(model.all_tied_weights_keys)
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside and name not in tied]
