"""What the model's output loses by an error in a block's output: the Fisher information of the hidden states."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lkq_hf.quantization.processes import Processes


@torch.enable_grad()
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
    device = tokens.device
    generator = torch.Generator(device).manual_seed(seed + processes.rank)
    moments: list[Tensor | None] = [None] * len(blocks)

    def watch(index: int) -> Any:
        def add(gradient: Tensor) -> None:
            rows = gradient.detach().float().flatten(0, -2)
            product = rows.T @ rows
            moment = moments[index]
            moments[index] = product if moment is None else moment.add_(product)

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            (output[0] if isinstance(output, tuple | list) else output).register_hook(add)

        return hook

    embedding = model.get_input_embeddings()
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(watch(index)).remove)
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
    result = []
    for moment in moments:
        if moment is None:
            raise ValueError("a block's output has no gradient: the model's forward does not go through it")
        processes.sum(moment)
        result.append(moment / moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    return result


def error_factor(fisher: Tensor, share: float) -> Tensor:
    """`L` with `L L^T = (1 - share) I + share * fisher`, `[hidden, hidden]`: the squared norm of `e L` weighs `e`.

    Args:
        fisher: with a mean diagonal of 1.
        share: 0 weighs all directions alike; below 1.
    """
    values, vectors = torch.linalg.eigh(fisher.double())
    return (vectors * ((1 - share) + share * values.clamp(min=0)).sqrt()).float()
