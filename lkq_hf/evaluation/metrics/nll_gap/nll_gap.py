"""What a changed model loses in likelihood of the unchanged one's text."""

import datasets
import evaluate

_DESCRIPTION = """
Mean negative log-likelihood per token of the same text under a changed model (an evicted cache, quantized weights) and
under the unchanged one, and their difference, in nats.
"""
_INPUTS = """
Args:
    predictions: negative log-likelihood of each token under the changed model, list of list of float.
    references: the same under the unchanged model, with the same lengths.
Returns:
    nll, reference_nll, nll_gap: means over all tokens, and nll - reference_nll.
Raises:
    ValueError: a text has not the same number of tokens on both sides, or there are no tokens.
"""


class NllGap(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": values, "references": values}),
        )

    def _compute(self, predictions, references):
        for index, (changed, unchanged) in enumerate(zip(predictions, references, strict=True)):
            if len(changed) != len(unchanged):
                raise ValueError(
                    f"text {index} has {len(changed)} tokens in predictions and {len(unchanged)} in references; "
                    "both must be the NLLs of the same text"
                )
        total = sum(map(len, references))
        if not total:
            raise ValueError("no tokens were given: expected at least one NLL")
        nll = sum(map(sum, predictions)) / total
        reference_nll = sum(map(sum, references)) / total
        return {"nll": nll, "reference_nll": reference_nll, "nll_gap": nll - reference_nll}
