"""Batches of prompts and responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def repetition(tokens: Sequence[int], size: int = 4) -> float:
    """Share of the runs of ``size`` tokens that occurred before: 0 for a text that never repeats itself, near 1 for a
    loop. Small models often answer in loops, and what those attend to is their own beginning, not the prompt."""
    runs = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@dataclass(frozen=True)
class TargetCollator:
    """Pads prompts on the left and responses on the right.

    Args:
        pad_token_id: what to pad with; masked, so any valid id will do.
        max_prompt_length: longer prompts lose tokens from their middle; None for no limit.
        max_response_length: longer responses are cut; None for no limit.
    """

    pad_token_id: int = 0
    max_prompt_length: int | None = None
    max_response_length: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [self._cut_prompt(list(example["input_ids"])) for example in examples]
        responses = [list(example["response_ids"])[: self.max_response_length] for example in examples]
        if not all(prompts) or not all(responses):
            raise ValueError(
                'every example needs "input_ids" (a prompt) and "response_ids" (the model\'s answer) with at least '
                "one token each; run generate_targets to make them"
            )
        prompt_ids, prompt_mask = self._pad(prompts, left=True)
        response_ids, response_mask = self._pad(responses, left=False)
        return {
            "input_ids": prompt_ids,
            "attention_mask": prompt_mask,
            "response_ids": response_ids,
            "response_mask": response_mask,
        }

    def _cut_prompt(self, prompt: list[int]) -> list[int]:
        limit = self.max_prompt_length
        if limit is None or len(prompt) <= limit:
            return prompt
        # Beginning and end hold the chat template and the task.
        return prompt[: limit // 2] + prompt[len(prompt) - (limit - limit // 2) :]

    def _pad(self, sequences: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, sequences))
        ids = torch.full((len(sequences), length), self.pad_token_id)
        mask = torch.zeros(len(sequences), length, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            here = slice(length - len(sequence), length) if left else slice(0, len(sequence))
            ids[row, here] = torch.tensor(sequence)
            mask[row, here] = True
        return ids, mask
