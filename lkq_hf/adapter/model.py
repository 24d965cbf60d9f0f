"""The LOOKAHEAD_KV tuner: attaches adapters to a model, and checks what is loaded into them."""

import re
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lkq_hf.adapter.config import LookaheadKVConfig
from lkq_hf.adapter.layer import LookaheadKVLayer, LookaheadKVLinear, LookaheadTokens, adapter_parameters
from lkq_hf.cache.fingerprint import model_sizes
from lkq_hf.cache.modules import attention_modules, cross_attention_modules
from lkq_hf.cache.prepare import get_decoder, prepare_model_for_eviction
from lkq_hf.scoring.base import PerLayerEmbedding
from lkq_hf.scoring.lookahead import ADAPTER_ATTRIBUTE
from lkq_hf.sharing.pushes import add_card_to_pushes

QUERY_AND_KEY_MODULES = (
    "q_proj", "k_proj", "qkv_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "query_key_value", "Wqkv", "c_attn", "query", "key",
)  # fmt: skip

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What a file of weights may hold."""


class LookaheadKVModel(BaseTuner):
    """A causal language model with lookahead tokens and their LoRA (LookaheadKV, arXiv 2603.10899).

    Usually made by ``peft.get_peft_model(model, LookaheadKVConfig())``, ``PeftModel.from_pretrained`` or
    ``model.load_adapter``. The model's outputs do not change: the adapter acts only where a
    `LookaheadCache` reads a prompt.

    Args:
        model: a decoder-only model of transformers.
        config: a `LookaheadKVConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the weights on the meta device, to be filled by loading.

    Raises:
        TypeError: not a decoder-only model of transformers.
        ValueError: the config was made for a model of other sizes.
        NotImplementedError: accelerate offloads a part of the model.
    """

    prefix = "lookahead_kv_"
    tuner_layer_cls = LookaheadKVLayer
    # None means every linear module of the decoder's layers, so no list of architectures is needed.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        decoder = get_decoder(model)
        _refuse_offloaded(decoder)
        _check_shape(cast(LookaheadKVConfig, peft_config), decoder)
        prepare_model_for_eviction(model)
        self._decoder_name = next(name for name, module in model.named_modules() if module is decoder)
        name, layers = _layers(decoder)
        self._layers_name = f"{self._decoder_name}.{name}." if self._decoder_name else f"{name}."
        self._last_layer = f"{self._layers_name}{len(layers) - 1}."
        unused = {id(module) for module in cross_attention_modules(decoder)}
        self._unused = tuple(f"{name}." for name, module in model.named_modules() if id(module) in unused)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = cast(LookaheadKVConfig, self.peft_config[adapter_name])
        if config.target_modules == []:
            self._prepare_model(config, model)
            for parameter in model.parameters():
                parameter.requires_grad = False
        else:
            if config.target_modules is None and not any(map(_is_linear, get_decoder(model).modules())):
                raise TypeError(
                    f"{type(model).__name__} has no linear modules for a LOOKAHEAD_KV adapter. Train learned tokens "
                    "alone: LookaheadKVConfig(target_modules=[])."
                )
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        # Only now: an injection freezes every module that has no prefix of a tuner in its name.
        self._attach_tokens(model, adapter_name, config)

    def _attach_tokens(self, model: nn.Module, adapter_name: str, config: LookaheadKVConfig) -> None:
        decoder = get_decoder(model)
        tokens = getattr(decoder, ADAPTER_ATTRIBUTE, None)
        if tokens is None:
            tokens = LookaheadTokens(decoder.get_input_embeddings())
            tokens._active_adapter = self.active_adapter
            setattr(decoder, ADAPTER_ATTRIBUTE, tokens)
        # Some decoders make their hidden states of smaller embeddings (ELECTRA).
        size = getattr(decoder.get_input_embeddings(), "embedding_dim", decoder.config.hidden_size)
        tokens.update_layer(adapter_name, config, size, PerLayerEmbedding.of(decoder))

    def _check_target_module_exists(self, peft_config: LookaheadKVConfig, key: str) -> bool | re.Match[str] | None:  # type: ignore[override]
        name = key.removesuffix(".base_layer").rpartition(".")[2]
        if key.startswith(self._last_layer) and peft_config.last_layer_modules != "all":
            allowed = (
                QUERY_AND_KEY_MODULES if peft_config.last_layer_modules is None else peft_config.last_layer_modules
            )
            if name not in allowed:
                return False
        if peft_config.target_modules is not None:
            return check_target_module_exists(peft_config, key)
        in_layers = key.startswith(self._layers_name) and not key.startswith(self._unused)
        module = self.model.get_submodule(key)
        return in_layers and _is_linear(module) and "Router" not in type(module).__name__

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: LookaheadKVConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, LookaheadKVLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if not _is_linear(target):
            raise TypeError(
                f"target module {current_key!r} is a {type(target).__name__}; LOOKAHEAD_KV adapters attach to linear "
                "modules. Correct target_modules in the LookaheadKVConfig."
            )
        layer = LookaheadKVLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(
            "a LOOKAHEAD_KV adapter cannot be merged: it acts on the lookahead tokens only, and merged weights act on "
            "every token. Keep it as an adapter, or drop it with unload()."
        )

    def unload(self) -> nn.Module:
        decoder = get_decoder(self.model)
        delattr(decoder, ADAPTER_ATTRIBUTE)
        return super().unload()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Another adapter wrapped around ours, or ours around it, must not show in the file.
        return super()._remove_adapter_name_from_key(key, adapter_name).replace(".base_layer.", ".")

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        # Runs while `model` is being saved: the one place where a tuner meets the object that may be pushed next.
        add_card_to_pushes(model)
        return super()._get_adapter_state_dict(model, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_state_dict(adapter_parameters(model, adapter_name), remapped)
        return remapped


def _check_state_dict(parameters: dict[str, nn.Parameter], state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless the tensors are exactly those of the adapter, in shape and type, and finite."""
    problems = []
    if missing := sorted(parameters.keys() - state_dict.keys()):
        problems.append(f"{len(missing)} tensors are missing ({', '.join(missing[:3])}, ...)")
    if unexpected := sorted(state_dict.keys() - parameters.keys()):
        problems.append(f"{len(unexpected)} tensors are unexpected ({', '.join(unexpected[:3])}, ...)")
    for name in sorted(parameters.keys() & state_dict.keys()):
        expected, found = tuple(parameters[name].shape), tuple(state_dict[name].shape)
        if expected != found:
            problems.append(f"{name} should have shape {list(expected)}, found {list(found)}")
        elif state_dict[name].dtype not in WEIGHT_DTYPES:
            problems.append(f"{name} should hold floating-point numbers, found {state_dict[name].dtype}")
        elif not torch.isfinite(state_dict[name]).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            "the adapter's weights do not fit its config and this model: "
            + "; ".join(problems[:5])
            + more
            + ". The file is damaged, or it belongs to another model or config."
        )


def _is_linear(module: nn.Module) -> bool:
    """A linear module, quantized or wrapped by another adapter."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, nn.Linear | Conv1D) or (hasattr(base, "in_features") and hasattr(base, "out_features"))


def _layers(decoder: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the decoder's layers, and its name in the decoder.

    Raises:
        TypeError: there is none.
    """
    attention = {id(module) for module in attention_modules(decoder)}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and attention <= {id(each) for each in module.modules()}:
            return name, module
    raise TypeError(
        f"{type(decoder).__name__} has no list of layers that holds all of its attention, as a LOOKAHEAD_KV adapter "
        'needs. Choose a scorer that needs no adapter, such as LookaheadCache(budget=..., scorer="snapkv").'
    )


def _refuse_offloaded(decoder: PreTrainedModel) -> None:
    """accelerate brings in a layer's weights when the layer runs; an adapter's are read at other times.

    Raises:
        NotImplementedError: a layer waits in main memory or on disk.
    """
    for name, module in decoder.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise NotImplementedError(
                f"{name} is offloaded to main memory or disk, where a LOOKAHEAD_KV adapter cannot be attached to it. "
                "Spread the model over GPUs only (device_map without cpu and disk, or tp_plan), quantize it, or "
                'choose a scorer that needs no adapter, such as LookaheadCache(budget=..., scorer="snapkv").'
            )


def _check_shape(config: LookaheadKVConfig, decoder: PreTrainedModel) -> None:
    """Fills the sizes of the base model into a new config, or compares them with a loaded one."""
    found = model_sizes(decoder.config)
    if config.base_model_shape is None:
        config.base_model_shape = found
    differing = [
        f"{name} is {found.get(name)} and should be {value}"
        for name, value in config.base_model_shape.items()
        if found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"this adapter was made for another base model ({config.base_model_name_or_path}): "
            + "; ".join(differing)
            + ". Load it into that model, or train one for this model."
        )
