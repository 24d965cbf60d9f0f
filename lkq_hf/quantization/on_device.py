"""A whole model on the compute device for a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def on_device(model: PreTrainedModel, device: torch.device | str) -> Iterator[None]:
    """The model on `device`; at the end it is where it was, also if it did not fit."""
    home = model.get_input_embeddings().get_parameter("weight").device
    try:
        nn.Module.to(model, torch.device(device))
        yield
    finally:
        nn.Module.to(model, home)
