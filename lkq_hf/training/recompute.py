"""Backward passes that read each layer again instead of holding all that the forward computed.

transformers' own ``gradient_checkpointing_enable`` drops the cache, over which all forwards of the training run.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def recomputing_layers(decoder: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Lets the forwards inside hold only the input of each layer; their backward runs the layers once more.

    The gradients are the same. Layers that are no ``GradientCheckpointingLayer`` of transformers run as always.

    Args:
        decoder: the stack of layers.
        context: makes the context in which a layer is run again, which is that of the forward. A backward pass may
            run in another thread, and after the forward's own context has ended.
    """
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), context()),
        )
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
