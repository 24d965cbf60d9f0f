"""Metrics of this package, as modules of the ``evaluate`` library.

Each folder is a self-contained script that ``evaluate.load(path)`` accepts. ``answer_match`` and ``word_f1`` take
texts, ``token_agreement`` and ``topk_recall`` take integers, ``nll_gap`` and ``perplexity`` take NLLs per token: those
that take the same can be put together with ``evaluate.combine``.
"""

from pathlib import Path
from typing import Any

import evaluate

METRICS = (
    "answer_match",
    "nll_gap",
    "perplexity",
    "retained_attention_mass",
    "token_agreement",
    "topk_recall",
    "word_f1",
)


def metric_path(name: str) -> str:
    """The folder to give to ``evaluate.load``.

    Raises:
        ValueError: no metric has that name.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; choose one of {', '.join(METRICS)}")
    return str(Path(__file__).parent / name)


def load_metric(name: str, **kwargs: Any) -> evaluate.Metric:
    """``evaluate.load`` of a metric of this package, without network; ``kwargs`` go to ``evaluate.load``."""
    return evaluate.load(metric_path(name), **kwargs)
