"""Long texts that a model writes with all of their cache: compiled, where that pays."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from lkq_hf.cache.cache import LookaheadCache
from lkq_hf.cache.prepare import prepare_model_for_decoding_loop

LEAST_STEPS = 2_048
"""Decoding steps for which it pays to compile one. For an 8B model on an H200 that takes half a minute, up to three
times because shapes differ, and saves some 50 ms of each step."""

NewCache = Callable[[int], LookaheadCache | None]
"""Gives the `past_key_values` of a call of ``generate`` that adds so many tokens. Let go of one before the next."""


@contextmanager
def writing_whole_texts(model: PreTrainedModel, steps: float) -> Iterator[NewCache]:
    """Where there is much to write, a GPU decodes by the compiled loop of `LookaheadCache`, whose budget is then the
    whole text: nothing is evicted. Otherwise ``generate`` is left to its own cache.

    Args:
        model: on the device to use.
        steps: that all calls of ``generate`` will take together.
    """
    prepared = prepare_model_for_decoding_loop(model) if steps >= LEAST_STEPS else None
    if prepared is None:
        yield lambda tokens: None
        return
    given: weakref.WeakSet[LookaheadCache] = weakref.WeakSet()

    def free() -> None:
        if given:
            gc.collect()  # where torch has compiled, a cache is part of a cycle of references

    def new_cache(tokens: int) -> LookaheadCache:
        free()
        # No scorer is ever asked: the whole text fits into the budget.
        cache = LookaheadCache(1.0, "streaming", max_new_tokens=tokens)
        given.add(cache)
        return cache

    with prepared:
        yield new_cache
    free()
