"""Continuous batching (`generate_batch`), which has a paged cache of its own and takes no other."""

from collections.abc import Callable
from typing import Any

from lkq_hf.cache.evicted import EvictedCache


def refuse_cache(generate_batch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Guards ``generate_batch``, which takes ``past_key_values`` and ignores it.

    Raises:
        NotImplementedError: a LookaheadCache is passed.
    """
    if isinstance(kwargs.get("past_key_values"), EvictedCache):
        raise NotImplementedError(
            "generate_batch keeps every token in a paged cache of its own and ignores past_key_values: nothing would "
            "be evicted. Call generate with padded prompts and a LookaheadCache, or leave past_key_values out."
        )
    return generate_batch(*args, **kwargs)
