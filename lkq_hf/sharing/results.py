"""Measured numbers for a model card: from the JSON files that evaluations and trainings write."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from lkq_hf.files import read_json

METRICS = {
    "answer_match": "Answers found",
    "token_agreement": "Tokens as with the full cache",
    "nll_gap": "NLL gap to the full cache",
    "topk_recall": "Recall of the oracle's top entries",
    "retained_attention_mass": "Attention mass kept",
    "nll": "NLL",
    "perplexity": "Perplexity",
    "kl": "KL divergence from the original model, mean (nats)",
    "kl_p99": "KL divergence from the original model, 99th percentile (nats)",
    "same_top": "Same top token as the original model",
}
"""Metrics that go into a card, and their names there."""

LOOKAHEAD = "lookahead"


def read_results(path: str | Path) -> list[EvalResult]:
    """Results for the ``model-index`` of a card.

    Args:
        path: what ``lkq-hf evaluate`` wrote (a JSON object with ``rows``), or the metrics of a training (numbers, of
            which ``eval_recall@N`` and ``eval_lost@N`` are read). Rows of other scorers than the adapter's are
            baselines and left out.

    Raises:
        ValueError: the file holds no results.
    """
    path = Path(path)
    results = list(find_results(read_json(path)))
    if not results:
        raise ValueError(
            f"{path} holds no results: expected the JSON file of lkq-hf evaluate (rows with {', '.join(METRICS)}) or "
            "the metrics of a training"
        )
    return results


def find_results(values: dict[str, Any]) -> Iterator[EvalResult]:
    """The results among the ``rows`` of an evaluation, or the ``metrics`` of a training."""
    for row in values.get("rows", []):
        if row.get("scorer") not in (None, LOOKAHEAD):
            continue
        dataset = f"{row['task']}, {row['length']} tokens" if "task" in row else "text"
        setting = f" at budget {row['budget']}" if row.get("budget") is not None else ""
        for metric, name in METRICS.items():
            if row.get(metric) is not None:
                yield _result(dataset, metric, f"{name}{setting}", row[metric])
    metrics = values.get("metrics", values)
    for key, value in metrics.items():
        if key.startswith("eval_recall@"):
            budget = key.partition("@")[2]
            yield _result("validation prompts", "topk_recall", f"{METRICS['topk_recall']} at budget {budget}", value)
        if key.startswith("eval_lost@"):
            budget = key.partition("@")[2]
            yield _result("validation prompts", "nll_gap", f"{METRICS['nll_gap']} at budget {budget}", value)


def _result(dataset: str, metric: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="custom",
        dataset_name=dataset,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 4),
    )
