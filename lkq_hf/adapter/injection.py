"""Adapters inside a model of transformers, by PEFT's functions alone.

A model's own `add_adapter`, `set_adapter` and `delete_adapter` refuse to work where transformers asks for a newer PEFT
than there is (transformers 5.24 asks for PEFT 0.22). These functions do the same and work with every version.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import delete_adapter
from transformers import PreTrainedModel


def inject_adapter(model: PreTrainedModel, config: PeftConfig, adapter_name: str = "default") -> None:
    """Adds a new adapter to the model; the first one is active.

    Args:
        model: a model of transformers.
        config: of the adapter.
        adapter_name: its name in the model.

    Raises:
        ValueError: the model has an adapter of this name.
    """
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"the model has an adapter {adapter_name!r} already: choose another adapter_name")
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.name_or_path
    inject_adapter_in_model(config, model, adapter_name)
    model._hf_peft_config_loaded = True


def inject_trained_adapter(
    model: PreTrainedModel, config: PeftConfig, weights: Mapping[str, torch.Tensor], adapter_name: str = "default"
) -> None:
    """Adds an adapter with these weights, for inference. If they do not fit, the model is left without it.

    Args:
        model: a model of transformers.
        config: of the adapter; its ``inference_mode`` is set.
        weights: by the names that PEFT gives them in a file.
        adapter_name: its name in the model.

    Raises:
        ValueError: the model has an adapter of this name, or the weights do not fit the config.
    """
    config.inference_mode = True
    inject_adapter(model, config, adapter_name)
    try:
        set_peft_model_state_dict(model, dict(weights), adapter_name)
    except BaseException:
        remove_adapter(model, adapter_name)
        raise


def remove_adapter(model: PreTrainedModel, adapter_name: str) -> None:
    """Takes an adapter out of the model again.

    Raises:
        KeyError: the model has none of this name.
    """
    configs: dict[str, Any] = model.peft_config
    delete_adapter(model, adapter_name, prefix=f"{configs[adapter_name].peft_type.value.lower()}_")
    del configs[adapter_name]
    if not configs:
        del model.peft_config
        model._hf_peft_config_loaded = False
