"""Scorers: which prompt entries of the KV cache matter. One file each, queries and keys in, one score per key out."""

from lkq_hf.scoring.base import PrefillAttention, Scorer
from lkq_hf.scoring.lookahead import LookaheadScorer
from lkq_hf.scoring.oracle import OracleScorer
from lkq_hf.scoring.random import RandomScorer
from lkq_hf.scoring.snapkv import SnapKVScorer
from lkq_hf.scoring.streaming import StreamingScorer

SCORERS: dict[str, type[Scorer]] = {
    "lookahead": LookaheadScorer,
    "snapkv": SnapKVScorer,
    "streaming": StreamingScorer,
    "random": RandomScorer,
}
"""Scorers that can be named; the oracle needs a response and is passed as an object."""


def get_scorer(scorer: str | Scorer) -> Scorer:
    """The scorer of that name with its default parameters, or the object itself.

    Raises:
        ValueError: no scorer has that name.
        TypeError: neither a name nor a `Scorer`.
    """
    if isinstance(scorer, Scorer):
        return scorer
    if not isinstance(scorer, str):
        raise TypeError(f"scorer must be a name or a Scorer object, got {type(scorer).__name__}")
    if scorer not in SCORERS:
        hint = " (pass OracleScorer(response_ids) as an object)" if scorer == "oracle" else ""
        raise ValueError(f"unknown scorer {scorer!r}; choose one of {', '.join(sorted(SCORERS))}{hint}")
    return SCORERS[scorer]()


__all__ = [
    "SCORERS",
    "LookaheadScorer",
    "OracleScorer",
    "PrefillAttention",
    "RandomScorer",
    "Scorer",
    "SnapKVScorer",
    "StreamingScorer",
    "get_scorer",
]
