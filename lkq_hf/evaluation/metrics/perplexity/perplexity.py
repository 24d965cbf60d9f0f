"""Perplexity from the NLLs of tokens."""

import math

import datasets
import evaluate

_DESCRIPTION = """
Exponential of the mean negative log-likelihood per token (natural logarithm). Unlike the ``perplexity`` of the Hub,
this runs no model: it takes the NLLs, so that any cache and any quantization can be measured.
"""
_INPUTS = """
Args:
    predictions: negative log-likelihood of each token, list of list of float.
Returns:
    perplexity: over all tokens of all texts.
Raises:
    ValueError: no tokens.
"""


class Perplexity(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, predictions):
        total = sum(map(len, predictions))
        if not total:
            raise ValueError("no tokens were given: expected at least one NLL")
        return {"perplexity": math.exp(sum(map(sum, predictions)) / total)}
