"""The `HfQuantizer`: what `from_pretrained` and `save_pretrained` do for two-stage GPTQ checkpoints."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from lkq_hf.quantization.calibrate import calibrate, check_data
from lkq_hf.quantization.checkpoint import check_checkpoint, tensor_headers
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.install import replace_by_packed, restore_linear
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.packed_module import PackedModule
from lkq_hf.quantization.shared_input import share_inputs
from lkq_hf.sharing.pushes import add_card_to_pushes


class TwoStageGPTQHfQuantizer(HfQuantizer):
    """Calibrates on load where the checkpoint is not quantized, and loads packed weights where it is."""

    requires_calibration = False
    quantization_config: TwoStageGPTQConfig

    def __init__(self, quantization_config: TwoStageGPTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.requested_device_map: Any = None
        self.report: Any = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            check_data(self.quantization_config)

    def update_device_map(self, device_map: Any) -> Any:
        if self.pre_quantized:
            return device_map
        if "disk" in (device_map.values() if isinstance(device_map, dict) else [device_map]):
            raise ValueError(
                f"device_map={device_map!r} leaves a part of the model on disk, but a model that is being quantized "
                "has to fit into main memory. Quantize without device_map, save, and load the checkpoint with it; or "
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
            # Until all is loaded: some models initialize a layer's weight when they initialize what holds the layer.
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


def place(model: PreTrainedModel, device_map: Any) -> None:
    """Puts a model that was quantized in main memory where `device_map` asked for."""
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
