"""LookaheadCache: what is kept of a prompt, how long it says it is, and how it behaves under ``generate``."""

from lkq_hf.cache.cache import LookaheadCache
from lkq_hf.cache.prepare import EvictionHandle, prepare_model_for_eviction

__all__ = ["EvictionHandle", "LookaheadCache", "prepare_model_for_eviction"]
