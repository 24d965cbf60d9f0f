"""Answers to a prompt that a cache already holds: generated, or given and scored (teacher forcing)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lkq_hf.compat import pass_cache


def pad_left(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[batch, length]``, padded on the left, and the mask of real tokens (1) and padding (0)."""
    length = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (length - len(each)) + list(each) for each in sequences])
    mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in sequences])
    return ids, mask


@dataclass(frozen=True)
class Answers:
    """Answers to a batch of prompts.

    Attributes:
        ids: ``[batch, length]`` token ids.
        mask: ``[batch, length]``, True for the tokens up to and including the first that ends the answer.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    def tokens(self) -> list[list[int]]:
        """Each answer's tokens, without what follows its end."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]


def following_inputs(tokens: torch.Tensor, prompt_mask: torch.Tensor, cache: Cache) -> dict[str, Any]:
    """Arguments of a forward of ``tokens`` (``[batch, count]``) over a cache that holds everything before them.

    Args:
        tokens: what to read.
        prompt_mask: ``[batch, tokens read so far]``.
        cache: what was read so far; changed by the forward.
    """
    mask = F.pad(prompt_mask, (0, tokens.shape[1]), value=1)
    positions = prompt_mask.sum(-1, keepdim=True) + torch.arange(tokens.shape[1], device=tokens.device)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": True,
        **pass_cache(cache),
    }


@torch.no_grad()
def answer_greedily(
    model: PreTrainedModel, logits: torch.Tensor, prompt_mask: torch.Tensor, cache: Cache, max_new_tokens: int
) -> Answers:
    """The most likely token after each other, from a cache that holds the prompt.

    This is ``model.generate(do_sample=False)`` without the penalties that a model's generation config may ask for.

    Args:
        model: the model.
        logits: ``[batch, vocabulary]`` after the prompt.
        prompt_mask: ``[batch, length]``, 1 for real tokens, padding on the left.
        cache: holds the prompt, and afterwards the answers too.
        max_new_tokens: longest answer, in tokens.
    """
    end_tokens = _end_tokens(model)
    tokens: list[torch.Tensor] = []
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    mask = prompt_mask
    while True:
        token = logits.argmax(-1)
        tokens.append(token)
        finished |= torch.isin(token, end_tokens)
        if len(tokens) == max_new_tokens or bool(finished.all()):
            break
        logits = model(**following_inputs(token[:, None], mask, cache)).logits[:, -1]
        mask = F.pad(mask, (0, 1), value=1)
    ids = torch.stack(tokens, dim=1)
    is_end = torch.isin(ids, end_tokens)
    return Answers(ids, is_end.cumsum(1) - is_end.long() == 0)


@torch.no_grad()
def score_answers(
    model: PreTrainedModel, logits: torch.Tensor, prompt_mask: torch.Tensor, cache: Cache, answers: Answers
) -> tuple[torch.Tensor, torch.Tensor]:
    """How likely given answers are (teacher forcing).

    Args:
        model, logits, prompt_mask, cache: see `answer_greedily`. The answers are appended to the cache.
        answers: what to score.

    Returns:
        The negative log-likelihood of each token in nats, and the token that the model itself would have chosen at
        its place; both ``[batch, length]``.
    """
    following = model(**following_inputs(answers.ids, prompt_mask, cache)).logits[:, :-1]
    every = torch.cat([logits[:, None], following], dim=1).float()
    nll = F.cross_entropy(every.transpose(1, 2), answers.ids, reduction="none")
    return nll, every.argmax(-1)


def _end_tokens(model: PreTrainedModel) -> torch.Tensor:
    ids = model.generation_config.eos_token_id
    return torch.tensor([] if ids is None else ids, dtype=torch.long, device=model.device).reshape(-1)
