"""Options that several subcommands share."""

from datetime import timedelta
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Model: a directory or an id on the Hub.", metavar="MODEL")]
Dtype = Annotated[str, typer.Option(help="Data type of the model's weights: float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda or cpu; by default the best there is.")]


def load_model(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A causal language model on a device, and its tokenizer.

    Raises:
        ValueError: no such data type.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(dtypes)}")
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtypes[dtype])
    return causal_lm.to(device).eval(), AutoTokenizer.from_pretrained(model)


def find_device(device: str | None) -> tuple[Any, str]:
    """Where this process stands among those of a launch (``accelerate launch``, ``torchrun``), and its own device.

    Args:
        device: what the user asked for; a kind of accelerator stands for each process's own one.
    """
    import torch
    from accelerate import PartialState

    # Without an accelerator, several processes find each other only when told that they are on CPUs. Where one has
    # more left to do than another, the other waits longer than the half an hour after which NCCL gives up.
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    if on_cpu or (device is not None and device != state.device.type):
        return state, device or "cpu"
    return state, str(state.device)
