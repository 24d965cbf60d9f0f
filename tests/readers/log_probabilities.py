"""Log-probabilities of tokens, by which engines are compared with this package."""

import torch
from real_models import smollm2_directory
from transformers import AutoModelForCausalLM


def log_probabilities(path, rows, dtype):
    """Of every token but the first, in one list."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    found = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
        found.append(scores.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


def assert_equal_to_rounding(theirs, ours, rows):
    """An engine that computes in bfloat16 is no farther from our float32 than our own bfloat16 is.

    Args:
        theirs: a list of log-probabilities for each row.
        ours: directory of the checkpoint.
        rows: lists of token ids.
    """
    found = torch.tensor([score for row in theirs for score in row])
    exact = log_probabilities(ours, rows, torch.float32)
    rounding = (log_probabilities(ours, rows, torch.bfloat16) - exact).abs().mean()
    quantization = (log_probabilities(smollm2_directory(), rows, torch.float32) - exact).abs().mean()
    error = (found - exact).abs().mean()
    assert error < 1.5 * rounding < quantization / 2, (error, rounding, quantization)
