"""Options that several subcommands share."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Model: a directory or an id on the Hub.", metavar="MODEL")]
Dtype = Annotated[str, typer.Option(help="Data type of the model's weights: float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda or cpu; by default the best there is.")]


def load_model(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A decoder-only language model on a device, and its tokenizer.

    Raises:
        FileNotFoundError: no such directory, or one without a model.
        ValueError: no such data type, or damaged weights.
        TypeError: a model of another kind.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lkq_hf.cache.prefill import get_decoder

    check_dtype(dtype)
    check_model(model)
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    get_decoder(causal_lm)
    return causal_lm.to(device).eval(), AutoTokenizer.from_pretrained(model)


def check_dtype(dtype: str, *more: str) -> None:
    """Raises ValueError for a data type that is neither one of the usual ones nor one of ``more``."""
    known = ("float32", "bfloat16", "float16", *more)
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(known)}")


def check_model(model: str, quantised: bool = True) -> None:
    """Checks what can be known of a model before its weights are read.

    Args:
        model: a directory or an id on the Hub.
        quantised: whether it may be quantised already, or have an adapter beside it.

    Raises:
        FileNotFoundError: no such directory, or one without a model.
        ValueError: a weight file in it is damaged, or it is quantised or has an adapter and should not.
        TypeError: a model of another kind.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    directory = Path(model).expanduser()
    if not directory.is_dir() and (re.match(r"[./~]", model) or model.count("/") > 1):
        raise FileNotFoundError(f"there is no directory {model}; expected one with a model, or an id on the Hub")
    if directory.is_dir():
        names = {path.name for path in directory.iterdir()}
        for path in directory.glob("*.safetensors"):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or truncated ({error}); write or copy it again") from error
        if not quantised and "adapter_config.json" in names:
            raise ValueError(
                f"{model} holds an adapter (adapter_config.json); expected a directory with a model alone. Name the "
                "base model of the adapter; a LoRA that should become a part of its weights has to be merged before"
            )
        if "adapter_config.json" in names and "config.json" not in names:
            return  # transformers loads the model that the adapter names
        if "config.json" not in names:
            found = ", ".join(sorted(names)[:5]) or "nothing"
            raise FileNotFoundError(f"{model} holds no model: expected a config.json and weights, found {found}")
        config = AutoConfig.from_pretrained(model)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
            raise TypeError(
                f"{model} holds a {config.model_type} model; expected a decoder-only language model, one that "
                "AutoModelForCausalLM loads"
            )
        settings = getattr(config, "quantization_config", None)
        # MXFP4 is the format in which gpt-oss comes.
        if not quantised and settings is not None and settings["quant_method"] != "mxfp4":
            raise ValueError(f"{model} is quantised already; expected a model in full precision")


def model_note(model: str, causal_lm: Any, dtype: str, *files: str | Path | None) -> dict[str, Any]:
    """What results depend on of a model and of files, for the note of a run's arguments.

    Args:
        model: a directory or an id on the Hub, as it was given.
        causal_lm: what was loaded from there.
        dtype: data type of its weights.
        files: files, and directories of adapters, that results depend on too; None for one that was not given.
    """
    from lkq_hf.evaluation.environment import digests

    return {
        "model": model,
        "revision": getattr(causal_lm.config, "_commit_hash", None),
        "dtype": dtype,
        # A directory of the same name may hold another model by now.
        "sha256": digests([model, *(file for file in files if file is not None)]),
    }


def find_device(device: str | None) -> tuple[Any, str]:
    """Where this process stands among those of a launch (``accelerate launch``, ``torchrun``), and its own device.

    Args:
        device: what the user asked for; a kind of accelerator stands for each process's own one.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch
    from accelerate import PartialState

    if device is not None:
        _check_device(device)

    # Without an accelerator, several processes find each other only when told that they are on CPUs. Where one has
    # more left to do than another, the other waits longer than the half an hour after which NCCL gives up.
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    if on_cpu or (device is not None and device != state.device.type):
        return state, device or "cpu"
    return state, str(state.device)


def _check_device(device: str) -> None:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        found = torch.device(device)
        known = found.type == "cpu" or (found.type in kinds and (found.index or 0) < torch.accelerator.device_count())
    except RuntimeError:
        known = False
    if not known:
        raise ValueError(
            f"there is no device {device!r} here: expected {' or '.join(kinds)} (torch {torch.__version__}); by "
            "default the best one is taken"
        )
