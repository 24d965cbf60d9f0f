"""What the model's output loses by an error in a block's or a layer's output: the Fisher information of outputs."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.processes import Processes


def output_fisher(
    model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, processes: Processes, seed: int = 0
) -> list[Tensor]:
    """`E[g g^T]` of every block's output, float32 `[hidden, hidden]` each, with a mean diagonal of 1.

    `g` is the gradient of the log-likelihood of tokens drawn from the model's own predictions. To second order an
    error `e` in a block's output raises the divergence from the model by `e^T E[g g^T] e / 2`.

    Args:
        model: the full-precision model, whole, on the device where this runs.
        blocks: of the model.
        tokens: int64 `[windows, length]`; one window at a time goes through the model and back.
        processes: whose windows count together.
        seed: of the drawn tokens.
    """
    moments: list[Tensor | None] = [None] * len(blocks)

    def add(index: int, rows: Tensor) -> None:
        product = rows.T @ rows
        moment = moments[index]
        moments[index] = product if moment is None else moment.add_(product)

    _backward(model, dict(enumerate(blocks)), tokens, add, seed + processes.rank)
    result = []
    for moment in moments:
        if moment is None:
            raise ValueError("a block's output has no gradient: the model's forward does not go through it")
        processes.sum(moment)
        result.append(moment / moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    return result


def layer_fisher(
    model: PreTrainedModel, layers: dict[str, nn.Module], tokens: Tensor, seed: int = 0
) -> dict[str, Tensor]:
    """`E[g^2]` of every layer's output, float32 `[out_features]` each, over all tokens; see `output_fisher`.

    A layer that computes some tokens only (an expert) has no gradient for the others.

    Args:
        layers: linear layers of the model, by name.
    """
    sums = {name: torch.zeros(linear_weight(layer).shape[0], device=tokens.device) for name, layer in layers.items()}

    def add(name: str, rows: Tensor) -> None:
        sums[name] += rows.square().sum(0)

    _backward(model, layers, tokens, add, seed)
    return {name: total / tokens.numel() for name, total in sums.items()}


@torch.enable_grad()
def _backward(
    model: PreTrainedModel,
    modules: dict[Any, nn.Module],
    tokens: Tensor,
    add: Callable[[Any, Tensor], None],
    seed: int,
) -> None:
    """Calls `add` with the key of a module and gradients for its output, float32 `[tokens, features]`, as they come.

    They are gradients of the log-likelihood of tokens drawn from the model's own predictions.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)

    def watch(key: Any) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: add(key, gradient.detach().float().flatten(0, -2)))

        return hook

    embedding = model.get_input_embeddings()
    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_hook(watch(key)).remove)
        # Gradients start at the embedding's output, so that no weight needs one.
        stack.callback(embedding.register_forward_hook(lambda _m, _a, output: output.detach().requires_grad_()).remove)
        needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in needed:
            parameter.requires_grad_(False)
        try:
            for window in tokens.split(1):
                logits = model(input_ids=window, use_cache=False).logits[0].float()
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
                F.cross_entropy(logits, drawn, reduction="sum").backward()
        finally:
            for parameter in needed:
                parameter.requires_grad_(True)


def error_factor(fisher: Tensor, share: float) -> Tensor:
    """`L` with `L L^T = (1 - share) I + share * fisher`, `[hidden, hidden]`: the squared norm of `e L` weighs `e`.

    Args:
        fisher: with a mean diagonal of 1.
        share: 0 weighs all directions alike; below 1.
    """
    values, vectors = torch.linalg.eigh(fisher.double())
    return (vectors * ((1 - share) + share * values.clamp(min=0)).sqrt()).float()
