"""Perplexity of a model on given texts, and its divergence from another model, window by window."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkq_hf.evaluation.divergence import token_statistics
from lkq_hf.evaluation.environment import environment
from lkq_hf.evaluation.journal import Journal
from lkq_hf.evaluation.metrics import load_metric
from lkq_hf.text.text_start import text_start


def text_windows(
    documents: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_windows: int | None = None,
) -> torch.Tensor:
    """The documents, joined by empty lines and cut into windows that do not overlap; what is left over is dropped.

    Each window starts with what stands before all texts of the model (`text_start`).

    Args:
        documents: mappings with ``"text"``.
        tokenizer: the model's tokenizer.
        window: tokens in a window.
        max_windows: at most so many, from the start; None for all.

    Returns:
        ``[windows, window]`` token ids.

    Raises:
        ValueError: a window below 2 tokens, or less text than one window.
    """
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise ValueError(f"expected windows of at least 2 tokens, and at least one; got {window} and {max_windows}")
    text = "\n\n".join(document["text"] for document in documents)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = text_start(tokenizer)
    step = window - len(first)
    starts = range(0, len(tokens) - step + 1, step)[:max_windows]
    if not starts:
        raise ValueError(
            f"the texts hold {len(tokens)} tokens, less than a window of {step}: pass more text or a smaller window"
        )
    return torch.tensor([first + tokens[start : start + step] for start in starts])


def check_window(model: PreTrainedModel, window: int) -> None:
    """Raises ValueError for windows that are longer than the model's positions; quantizing refuses them too."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise ValueError(
            f"windows of {window} tokens are longer than the model's {longest} positions: pass a smaller window"
        )


def token_nlls(model: PreTrainedModel, windows: torch.Tensor) -> list[list[float]]:
    """Negative log-likelihood in nats of each window's tokens after its first. ``windows``: ``[batch, window]``."""
    return token_statistics(model, windows)["nll"]


def evaluate_perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    journal: Journal,
    batch_size: int = 1,
    reference: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Perplexity over windows of text, and how far the predictions are from a reference's.

    Under ``accelerate launch`` the batches are divided among the processes; the result does not depend on how many
    there are. Finished batches are in the journal: a stopped run goes on after them.

    Args:
        model: a causal language model.
        windows: ``[windows, window]`` token ids (`text_windows`).
        journal: of this run, in a directory that all processes see.
        batch_size: windows in a batch.
        reference: the model to compare with, such as the base model of a quantized one; on the same device.

    Returns:
        ``{"arguments", "environment", "rows"}`` with one row: ``windows``, ``tokens`` (that were predicted), ``nll``
        (mean, in nats) and ``perplexity``. With a reference also ``kl`` and ``kl_p99``, mean and 99th percentile over
        tokens of ``KL(reference || model)`` in nats, and ``same_top``, the share of tokens for which both models have
        the same most likely token.

    Raises:
        ValueError: a batch size below 1, windows that are longer than the positions of one of the models, or
            vocabularies of different sizes.
    """
    for each in (model, reference):
        if each is not None:
            check_window(each, windows.shape[1])
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    state = PartialState()
    batches = list(enumerate(windows.split(batch_size)))
    mine = batches[state.process_index :: state.num_processes]
    for index, batch in tqdm(mine, desc="perplexity", unit="batch", disable=state.process_index > 0):
        if _piece(index) not in journal:
            journal.write(_piece(index), token_statistics(model, batch, reference))
    state.wait_for_everyone()
    pieces = [journal.read(_piece(index)) for index, _ in batches]
    nlls = [row for piece in pieces for row in piece["nll"]]
    tokens = sum(map(len, nlls))
    row = {
        "windows": len(nlls),
        "tokens": tokens,
        "nll": sum(map(sum, nlls)) / tokens,
        **load_metric("perplexity", keep_in_memory=True).compute(predictions=nlls),
    }
    if reference is not None:
        divergences = numpy.concatenate([piece["kl"] for piece in pieces])
        row |= {
            "kl": float(divergences.mean()),
            "kl_p99": float(numpy.quantile(divergences, 0.99)),
            "same_top": float(numpy.concatenate([piece["same_top"] for piece in pieces]).mean()),
        }
    return {
        "arguments": journal.arguments,
        "environment": environment(model.device, state.num_processes),
        "rows": [row],
    }


def _piece(index: int) -> str:
    return f"statistics-{index:05d}"
