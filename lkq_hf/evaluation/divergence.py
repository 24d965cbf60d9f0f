"""What a model predicts for each token of a text, and how far that is from another model's predictions."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lkq_hf.cache.prepare import get_decoder
from lkq_hf.quantization.capture import replaced_forward

# Logits of one model that are in memory at once: 64 MiB in float32.
LOGITS = 1 << 24


@torch.no_grad()
def token_statistics(
    model: PreTrainedModel, windows: Tensor, reference: PreTrainedModel | None = None
) -> dict[str, list[list[float]]]:
    """Compares the predictions of a model for each token after the first of a window with the text and a reference.

    The logits are computed for some tokens at a time, so that no tensor of `[batch, window, vocabulary]` exists.

    Args:
        model: a causal language model.
        windows: `[batch, window]` token ids.
        reference: the model to compare with, such as the base model of a quantized one. On the same device.

    Returns:
        Rows of `window - 1` values: `"nll"`, the negative log-likelihood of the token in nats. With a reference also
        `"kl"`, `KL(reference || model)` of the two distributions in nats, and `"same_top"`, 1 where both have the
        same most likely token and else 0.

    Raises:
        ValueError: the models have vocabularies of different sizes.
    """
    windows = windows.to(model.device)
    positions = max(1, LOGITS // (model.config.get_text_config().vocab_size * len(windows)))
    models = [model] if reference is None else [model, reference]
    parts: dict[str, list[Tensor]] = {}
    pieces = zip(*(_logits(each, windows, positions) for each in models), strict=True)
    for targets, logits in zip(windows[:, 1:].split(positions, 1), pieces, strict=True):
        sizes = [piece.shape[-1] for piece in logits]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"expected a reference with the model's vocabulary of {sizes[0]} tokens, found one of {sizes[1]}; "
                "compare a quantized model with its own base model"
            )
        found, *wanted = (piece.log_softmax(-1) for piece in logits)
        parts.setdefault("nll", []).append(-found.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
        for expected in wanted:
            divergence = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
            parts.setdefault("kl", []).append(divergence)
            parts.setdefault("same_top", []).append((found.argmax(-1) == expected.argmax(-1)).float())
    return {name: torch.cat(each, 1).tolist() for name, each in parts.items()}


def _logits(model: Any, windows: Tensor, positions: int) -> Iterator[Tensor]:
    """The logits of all tokens but the last, float32 `[batch, positions, vocabulary]`, so many positions at a time.

    The decoder runs once. For each piece the model's own forward runs with the decoder returning a part of its hidden
    states, so that everything a model does to its logits is done.
    """
    decoder: Any = get_decoder(model)
    outputs: list[Any] = []
    forward = decoder.forward

    def last_position(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return _with_hidden(outputs[0], outputs[0].last_hidden_state[:, -1:])

    with replaced_forward(decoder, last_position):
        model(input_ids=windows, use_cache=False)
    for hidden in outputs[0].last_hidden_state[:, :-1].split(positions, 1):
        with replaced_forward(decoder, lambda *_, hidden=hidden, **__: _with_hidden(outputs[0], hidden)):
            logits = model(input_ids=windows[:, : hidden.shape[1]], use_cache=False).logits
        yield logits.float()


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return dataclasses.replace(output, last_hidden_state=hidden)
