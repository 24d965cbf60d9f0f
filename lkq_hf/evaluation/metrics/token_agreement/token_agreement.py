"""How far two token sequences agree."""

import datasets
import evaluate

_DESCRIPTION = """
Agreement of a model's tokens with those of another (here: the full cache's), position by position. Teacher-forced
predictions are judged by ``token_agreement``; of freely generated ones, which drift apart after the first difference,
``agreed_prefix`` tells how long they stayed together.
"""
_INPUTS = """
Args:
    predictions: token ids, list of list of int.
    references: token ids to agree with, list of list of int.
Returns:
    token_agreement: share of the references' positions at which both have the same token, over all sequences.
    agreed_prefix: share of the references' tokens before the first difference, over all sequences.
Raises:
    ValueError: all references are empty.
"""


class TokenAgreement(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions, references):
        same = prefix = total = 0
        for predicted, reference in zip(predictions, references, strict=True):
            agrees = [a == b for a, b in zip(predicted, reference, strict=False)]
            same += sum(agrees)
            prefix += agrees.index(False) if False in agrees else len(agrees)
            total += len(reference)
        if not total:
            raise ValueError("the references hold no tokens: expected at least one token id")
        return {"token_agreement": same / total, "agreed_prefix": prefix / total}
