"""The `HfQuantizer`: what `from_pretrained` and `save_pretrained` do for two-stage GPTQ checkpoints."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.calibrate import calibrate, find_layers
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.experts import (
    expert_weights,
    install_empty_experts,
    is_experts,
    packed_experts,
    projections,
    restore_experts,
    use_dense_experts,
    use_packed_experts,
)
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.packed_module import PackedModule
from lkq_hf.quantization.shared_input import share_inputs
from lkq_hf.quantization.solve import resolve_group_size

SAFETENSORS_DTYPES = {torch.int32: "I32", torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}


class TwoStageGPTQHfQuantizer(HfQuantizer):
    """Calibrates on load where the checkpoint is not quantised, and loads packed weights where it is."""

    requires_calibration = False
    quantization_config: TwoStageGPTQConfig

    def __init__(self, quantization_config: TwoStageGPTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.requested_device_map: Any = None
        self.report: Any = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.dataset is None:
            raise ValueError(
                "the checkpoint is not quantised, and to quantise it TwoStageGPTQConfig needs dataset= (a list of "
                "texts, a dataset, a text or .jsonl file, or a Hub dataset id)"
            )

    def update_device_map(self, device_map: Any) -> Any:
        if self.pre_quantized:
            return device_map
        if "disk" in (device_map.values() if isinstance(device_map, dict) else [device_map]):
            raise ValueError(
                f"device_map={device_map!r} leaves a part of the model on disk, but a model that is being quantised "
                "has to fit into main memory. Quantise without device_map, save, and load the checkpoint with it; or "
                "use TwoStageQuantizer with block_by_block=True, which reads one block at a time"
            )
        # The walk takes one block after another to its device: the model itself waits in main memory until it is
        # small, and only then goes where it was asked for.
        self.requested_device_map = device_map
        return {"": "cpu"}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        refuse_tensor_parallelism(model)
        if not self.pre_quantized:
            return
        packed = replace_by_packed(model, self.quantization_config)
        for layer in packed.values():
            # Until all is loaded: some models initialise a layer's weight when they initialise what holds the layer.
            if isinstance(layer, QuantizedLinear):
                vars(layer)["weight"] = torch.empty(layer.out_features, layer.in_features, device="meta")
        if checkpoint_files:
            check_checkpoint(model, packed, tensor_headers(checkpoint_files))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            for name, module in model.named_modules():
                if isinstance(module, PackedModule):
                    vars(module).pop("weight", None)
                    try:
                        module.validate()
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from None
            for name, parameter in model.named_parameters():
                if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                    raise ValueError(f"{name} holds values that are not finite: the checkpoint is damaged")
        else:
            self.report = calibrate(model, self.quantization_config)
            place(model, self.requested_device_map)
        share_inputs(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
        # Runs while the model is being saved, which comes before every push.
        from lkq_hf.hub.push import add_card_to_pushes

        add_card_to_pushes(model)
        return super().get_state_dict_and_metadata(model)

    def _dequantize(self, model: PreTrainedModel, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
        # A model that has been saved has the name of its dtype in its config.
        return restore_linear(model, torch_dtype(dtype or model.dtype))

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decode of a model with packed layers."""
        return True


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype or the name of one, found {dtype!r}")
    return found


def refuse_tensor_parallelism(model: PreTrainedModel) -> None:
    """transformers' plans cut plain weights, and would take a packed layer's whole output for one process's part.

    Raises:
        NotImplementedError: the model is being loaded under tensor parallelism.
    """
    distributed = getattr(model.config, "distributed_config", None)
    if (getattr(distributed, "tp_size", None) or 1) > 1:
        raise NotImplementedError(
            "two-stage GPTQ checkpoints cannot be cut for tensor parallelism (tp_plan). Spread the model over GPUs "
            'with device_map="auto", or export it (lkq-hf export) for an engine that cuts packed weights (vLLM).'
        )


def replace_by_packed(model: PreTrainedModel, config: TwoStageGPTQConfig) -> dict[str, PackedModule]:
    """Puts empty packed modules in the place of all that `config` selects, on the same devices.

    Returns:
        The modules by their names: one for each linear layer, and one for each projection of fused experts.
    """
    _, layers = find_layers(model, config)
    packed: dict[str, PackedModule] = {}
    for name, layer in layers.items():
        if is_experts(layer):
            inputs = [expert_weights(layer, projection)[0].shape[1] for projection in projections(layer)]
            group_sizes = [resolve_group_size(in_features, config.group_size) for in_features in inputs]
            install_empty_experts(layer, config.bits, group_sizes, config.sym)
            packed.update({f"{name}.{key}": m for key, m in layer.named_children() if isinstance(m, PackedModule)})
            continue
        weight = linear_weight(layer)
        out_features, in_features = weight.shape
        linear = QuantizedLinear(
            in_features,
            out_features,
            bits=config.bits,
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
                "modules_in_block_to_quantize) says is not quantised: it belongs to another checkpoint"
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


def place(model: PreTrainedModel, device_map: Any) -> None:
    """Puts a model that was quantised in main memory where `device_map` asked for."""
    if device_map is None:
        return
    if isinstance(device_map, str) and device_map in {"auto", "balanced", "balanced_low_0", "sequential"}:
        inferred = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules or ()))
        # What would go to disk, as if main memory had no room for it, is there.
        device_map = {name: "cpu" if device == "disk" else device for name, device in inferred.items()}
    if not isinstance(device_map, dict):
        device_map = {"": device_map}
    if len(set(device_map.values())) == 1:
        model.to(next(iter(device_map.values())))
        return
    dispatch_model(model, device_map)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
