"""Batches of prompts and responses."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from lkq_hf.training.prompts import ASKED_LATER


def repetition(tokens: Sequence[int], size: int = 4) -> float:
    """Share of the runs of ``size`` tokens that occurred before: 0 for a text that never repeats itself, near 1 for a
    loop. Small models often answer in loops, and what those attend to is their own beginning, not the prompt."""
    runs = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def before_loop(tokens: Sequence[int], size: int = 8) -> list[int]:
    """The tokens up to the first run of ``size`` that occurred before: an answer without the loop that it ends in."""
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - size + 1):
        run = tuple(tokens[start : start + size])
        if run in seen:
            return list(tokens[:start])
        seen.add(run)
    return list(tokens)


def usable_targets(
    targets: Sequence[Dataset],
    max_repetition: float = 1.0,
    cut_loops: bool = False,
    inside_answer_share: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """One data set of the targets that teach something.

    Args:
        targets: data sets of `generate_targets`.
        max_repetition: responses of which a larger share repeats itself (`repetition`) are left out.
        cut_loops: cut responses where they begin to repeat themselves (`before_loop`). Responses that are not
            the model's own (prompts of the kind "asked_later") stay as they are.
        inside_answer_share: share of the responses whose beginning is moved to the prompt, see
            `inside_answer`.
        seed: of that draw.

    Raises:
        ValueError: nothing is left.
    """
    every = concatenate_datasets(list(targets))
    if cut_loops:
        every = every.map(
            lambda row: {} if row.get("kind") == ASKED_LATER else {"response_ids": before_loop(row["response_ids"])}
        )
    kept = [index for index, tokens in enumerate(every["response_ids"]) if repetition(tokens) <= max_repetition]
    if not kept:
        raise ValueError(f"none of the {len(every)} responses repeats itself so little: raise --max-repetition")
    every = every.select(kept)
    if not inside_answer_share:
        return every

    def begin(row: dict[str, Any], index: int) -> dict[str, Any]:
        rng = random.Random(f"{seed}/{index}")
        own = row.get("kind") != ASKED_LATER
        return inside_answer(row, rng) if own and rng.random() < inside_answer_share else row

    return every.map(begin, with_indices=True)


def inside_answer(row: dict[str, Any], rng: random.Random, rest: int = 8) -> dict[str, Any]:
    """The same text with a prompt that ends inside the model's answer, as when a cache is evicted while it generates.

    Args:
        row: with ``"input_ids"`` and ``"response_ids"``.
        rng: draws the place.
        rest: tokens of the answer that are left at least. Shorter answers stay as they are.
    """
    prompt, response = list(row["input_ids"]), list(row["response_ids"])
    if len(response) <= rest:
        return row
    place = rng.randint(1, len(response) - rest)
    return {**row, "input_ids": prompt + response[:place], "response_ids": response[place:]}


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


class SeededLengthGroupedSampler(Sampler[int]):
    """Random order in which prompts of similar length share a step; it depends on the seed and the epoch alone.

    So the same steps are taken by any number of processes, and by a run that is resumed on another number of them.
    transformers' own sampler draws from the global generator, and groups by what one process reads. An epoch is filled
    up to whole steps with prompts from its beginning, as accelerate would, but for one process too.

    Args:
        lengths: of the prompts.
        step_size: prompts in a step, over all processes and accumulated batches.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order that the next iteration begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.step_size) * self.step_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.step_size, generator=generator)
        return islice(cycle(order), len(self))
