"""What ``generate`` is about to read: the text that a cache has read, and more."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.guards import generation_option


@dataclass(frozen=True)
class Turn:
    """A call of ``generate``.

    Attributes:
        cache: what is filled.
        start: length of the text before the ids that ``generate`` is called with.
        length: with them.
        rows_known: whether the rows of the result are those of the cache.
    """

    cache: EvictedCache
    start: int
    length: int
    rows_known: bool

    def end(self, output: Any) -> None:
        """Notes what was read. ``output`` is what ``generate`` returns."""
        sequences = getattr(output, "sequences", output)
        read = int(self.cache.get_seq_length()) if self.cache.has_prompt else 0
        if not self.rows_known or not isinstance(sequences, torch.Tensor) or self.start >= read:
            return
        if sequences.shape[0] == self.cache.batch and sequences.shape[1] >= read - self.start:
            self.cache.text.record(self.start, sequences[:, : read - self.start], min(self.length, read))


def begin_turn(cache: EvictedCache, defaults: GenerationConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Turn:
    """Compares the text that ``generate`` is called with to what the cache has read.

    Where the answer before differs, as after a chat template that trims it, the cache goes back to where it does.
    Nothing is compared where ``inputs_embeds`` or new ids alone, with a mask over the whole text, are passed.

    Args:
        cache: what will be filled.
        defaults: the model's own.
        args, kwargs: what ``generate`` is called with.

    Raises:
        ValueError: the text does not go on from what was read, or has another number of rows.
    """
    ids, embeds = given_ids(args, kwargs), kwargs.get("inputs_embeds")
    beams = generation_option("num_beams", defaults, args, kwargs) or 1
    copies = max(beams, generation_option("num_return_sequences", defaults, args, kwargs) or 1)
    seen = int(cache.get_seq_length()) if cache.has_prompt else 0
    passed = ids if embeds is None else embeds
    if seen and passed is not None:
        _refuse_other_batch(cache.batch, passed.shape[0], copies)
    if ids is None or embeds is not None:
        return Turn(cache, seen, seen, rows_known=False)
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        mask = None
    if seen and mask is not None and mask.shape[1] > ids.shape[1]:  # new ids alone
        return Turn(cache, seen, seen + ids.shape[1], beams == 1)
    if seen:
        _continue(cache, ids.repeat_interleave(copies, 0), None if mask is None else mask.repeat_interleave(copies, 0))
    return Turn(cache, 0, ids.shape[1], beams == 1)


def given_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The ids that ``generate`` is called with."""
    given = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
    return next((ids for ids in given if ids is not None), None)


def _continue(cache: EvictedCache, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    seen, length = int(cache.get_seq_length()), ids.shape[1]
    agreeing = cache.text.agreeing(ids, mask, seen)
    keep = min(agreeing or 0, length - 1)  # one token at least is read
    if keep == seen:
        return
    cause: ValueError | None = None
    if keep >= cache.text.given > 0:
        try:
            cache.crop(keep - seen)
            return
        except ValueError as error:
            cause = error
    if agreeing is None:
        found = f"its {length} tokens do not begin with those that were read before the cache was saved"
    else:
        found = f"the first {agreeing} of its {length} tokens agree with the {seen} that were read"
    raise ValueError(
        f"this text does not go on from what the LookaheadCache has read: {found}. Pass the same ids, such as those "
        "that generate returned, with new ones behind them, or the new ones alone with an attention_mask that covers "
        f"the {seen} before them too. Another text needs a new LookaheadCache, and so does each prompt of a list. For "
        "several questions about one text, pass each a copy.deepcopy(cache)."
        + (f" The cache could not go back: {cause}" if cause else "")
    ) from cause


def _refuse_other_batch(batch: int, rows: int, copies: int) -> None:
    if batch == rows * copies:
        return
    found = f"{rows}" if copies == 1 else f"{rows}, each {copies} times (num_beams, num_return_sequences)"
    raise ValueError(
        f"this LookaheadCache has read a batch of {batch} rows, and these inputs have {found}. Another batch needs a "
        "new LookaheadCache, and so does each prompt or batch of a list that is passed to a pipeline. "
        "cache.batch_repeat_interleave(...) and cache.batch_select_indices(...) change the rows of a cache."
    )
