"""The choice of a token by operations that a CUDA graph can hold: shapes are fixed, and the host is not asked.

It is the choice of transformers' ``generate``: the same logits processors, then the largest score, or a draw that
takes the same random numbers as `torch.multinomial`. Processors that look at the text get what they need of it as a
tensor that each new token updates.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import generation

# Processors of transformers whose result depends on the scores alone, by operations of fixed shapes. By name: not
# every version has all of them.
_OF_SCORES_ALONE = {
    getattr(generation, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
    if hasattr(generation, name)
}


class _OfScores:
    """A processor that does not look at the text."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def start(self, ids: torch.Tensor, vocabulary: int) -> None:
        """Takes the text so far, ``[batch, tokens]``."""

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return self._processor(None, scores)

    def note(self, token: torch.Tensor) -> None:
        """Takes the chosen tokens, ``[batch]``."""


class _Forbidden(_OfScores):
    """A processor that forbids the same tokens at every step."""

    _never: torch.Tensor

    def start(self, ids: torch.Tensor, vocabulary: int) -> None:
        if not hasattr(self, "_never"):
            self._never = self._processor(ids, torch.zeros(1, vocabulary, device=ids.device)) == -torch.inf

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self._never, -torch.inf)


class _LeastLength(_OfScores):
    """Forbids the end before a length of the text."""

    _length: torch.Tensor

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        if isinstance(processor, generation.MinLengthLogitsProcessor):
            self._least = processor.min_length
        else:
            self._least = processor.prompt_length_to_skip + processor.min_new_tokens

    def start(self, ids: torch.Tensor, vocabulary: int) -> None:
        if not hasattr(self, "_length"):
            self._length = torch.zeros((), dtype=torch.long, device=ids.device)
            columns = torch.arange(vocabulary, device=ids.device)
            self._ends = torch.isin(columns, self._processor.eos_token_id.to(ids.device))
        self._length.fill_(ids.shape[1])

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self._ends & (self._length < self._least), -torch.inf)

    def note(self, token: torch.Tensor) -> None:
        self._length.add_(1)


class _Repetition(_OfScores):
    """Penalizes tokens of the text."""

    _seen: torch.Tensor

    def start(self, ids: torch.Tensor, vocabulary: int) -> None:
        ignored = self._processor.prompt_ignore_length
        if isinstance(ignored, torch.Tensor):
            ignored = ignored.to(ids.device)[:, None]
        counts = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) >= (0 if ignored is None else ignored)
        # One column more takes what does not count.
        seen = torch.zeros(ids.shape[0], vocabulary + 1, dtype=torch.bool, device=ids.device)
        seen = seen.scatter(1, torch.where(counts, ids, vocabulary), True)[:, :vocabulary]
        self._seen = self._seen.copy_(seen) if hasattr(self, "_seen") else seen.contiguous()

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        penalty = self._processor.penalty
        return torch.where(self._seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)

    def note(self, token: torch.Tensor) -> None:
        self._seen.scatter_(1, token[:, None], True)


_ADAPTED: dict[type, Callable[[Any], _OfScores]] = {
    **dict.fromkeys(_OF_SCORES_ALONE, _OfScores),
    generation.SuppressTokensLogitsProcessor: _Forbidden,
    generation.MinLengthLogitsProcessor: _LeastLength,
    generation.MinNewTokensLengthLogitsProcessor: _LeastLength,
    generation.RepetitionPenaltyLogitsProcessor: _Repetition,
}


class TokenChoice:
    """Chooses tokens; what it keeps of the text stays where it is in memory.

    Args:
        processors: of ``generate``, in order.
        samples: whether tokens are drawn; otherwise the likeliest ones are taken.
    """

    def __init__(self, processors: Iterable[Any], samples: bool) -> None:
        self._steps = [_ADAPTED[type(processor)](processor) for processor in processors]
        self.samples = samples

    @staticmethod
    def knows(processors: Iterable[Any]) -> bool:
        """Whether these processors can be part of a graph."""
        return all(type(processor) in _ADAPTED for processor in processors)

    def start(self, ids: torch.Tensor, vocabulary: int) -> None:
        """Takes the text so far, ``[batch, tokens]``, after which the next token is chosen."""
        for step in self._steps:
            step.start(ids, vocabulary)

    def first(self, scores: torch.Tensor) -> torch.Tensor:
        """Tokens ``[batch]`` of scores ``[batch, vocabulary]`` that the processors have seen.

        Raises:
            RuntimeError: a score to draw from is not finite.
        """
        return scores.softmax(dim=-1).multinomial(1)[:, 0] if self.samples else scores.argmax(dim=-1)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Tokens ``[batch]``, of scores ``[batch, vocabulary]`` in float32."""
        for step in self._steps:
            scores = step(scores)
        if not self.samples:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        # As torch.multinomial draws one token, without its checks, which wait for the device.
        return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(dim=-1)

    def note(self, token: torch.Tensor) -> None:
        """Takes the tokens ``[batch]`` that were written behind the text."""
        for step in self._steps:
            step.note(token)
