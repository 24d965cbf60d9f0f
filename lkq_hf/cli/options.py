"""Options that several subcommands share."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from lkq_hf.cli.checks import check_adapter_directory, check_dtype, check_model_directory
from lkq_hf.files import check_safetensors

Model = Annotated[str, typer.Argument(help="Model: a directory or an id on the Hub.", metavar="MODEL")]
Dtype = Annotated[str, typer.Option(help="Data type of the model's weights: float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda or cpu; by default the best there is.")]

Allocation = Annotated[
    str,
    typer.Option(
        help="How entries are shared out: global (all heads compete), layer (those of a layer do), uniform, or "
        "profile (numbers of the adapter's config)."
    ),
]


def load_model(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A decoder-only language model on a device, and its tokenizer.

    Raises:
        FileNotFoundError: no such directory, or one without a model.
        ValueError: no such data type, or damaged weights.
        TypeError: a model of another kind.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lkq_hf.cache.prepare import get_decoder

    check_dtype(dtype)
    check_model(model)
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    get_decoder(causal_lm)
    return causal_lm.to(device).eval(), AutoTokenizer.from_pretrained(model)


def check_model(model: str, quantized: bool = True) -> None:
    """Checks what can be known of a model before its weights are read.

    Args:
        model: a directory or an id on the Hub.
        quantized: whether it may be quantized already, or have an adapter beside it.

    Raises:
        FileNotFoundError: no such directory or repository, or one without a model.
        ConnectionError: the Hub cannot be reached.
        ValueError: a weight file in it is damaged, or it is quantized or has an adapter and should not.
        TypeError: a model of another kind.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    check_model_directory(model, quantized)
    directory = Path(model).expanduser()
    if not directory.is_dir():
        _check_repository(model)
    for path in directory.glob("*.safetensors"):
        check_safetensors(path)
    if (directory / "config.json").is_file():
        config = AutoConfig.from_pretrained(model)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
            raise TypeError(
                f"{model} holds a {config.model_type} model; expected a decoder-only language model, one that "
                "AutoModelForCausalLM loads"
            )
        settings = getattr(config, "quantization_config", None)
        # MXFP4 is the format in which gpt-oss comes.
        if not quantized and settings is not None and settings["quant_method"] != "mxfp4":
            raise ValueError(f"{model} is quantized already; expected a model in full precision")


def check_adapter(adapter: str) -> None:
    """Checks that a directory or repository holds a lookahead adapter, before a model is loaded.

    Raises:
        FileNotFoundError: no such directory or repository.
        ConnectionError: the Hub cannot be reached.
        ValueError: it holds something else, or the file of weights is damaged.
    """
    from lkq_hf.hub import adapter_config

    check_adapter_directory(adapter)
    directory = Path(adapter).expanduser()
    if not directory.is_dir():
        _check_repository(adapter)
    adapter_config(adapter)
    for path in directory.glob("adapter_model.safetensors"):
        check_safetensors(path)


def _check_repository(repo_id: str) -> None:
    """Asks the Hub once whether it has a repository that its cache does not hold.

    Where the Hub cannot be reached, downloads try again for half a minute; a mistyped directory should not.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    from lkq_hf.sharing.errors import explained

    if any(isinstance(try_to_load_from_cache(repo_id, name), str) for name in ("config.json", "adapter_config.json")):
        return
    try:
        with explained(repo_id):
            HfApi().model_info(repo_id)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise type(error)(f"there is no directory {repo_id}, and {error}") from error


def model_config(model: str) -> Any:
    """The configuration of a model, or of the base model of an adapter, without its weights."""
    from transformers import AutoConfig

    directory = Path(model).expanduser()
    if directory.is_dir() and not (directory / "config.json").is_file():
        from peft import PeftConfig

        return AutoConfig.from_pretrained(PeftConfig.from_pretrained(model).base_model_name_or_path)
    return AutoConfig.from_pretrained(model)


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
