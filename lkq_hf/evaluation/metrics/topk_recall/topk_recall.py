"""How many of the best cache entries an eviction kept."""

import datasets
import evaluate

_DESCRIPTION = """
Share of the entries which the oracle (the attention of the answer itself) would keep that were kept. One example is
one KV head of one layer of one prompt.
"""
_INPUTS = """
Args:
    predictions: indices of the kept entries of each KV head, list of list of int.
    references: indices that the oracle keeps, list of list of int.
Returns:
    topk_recall: mean over the KV heads, between 0 and 1.
Raises:
    ValueError: an oracle that keeps nothing.
"""


class TopkRecall(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        indices = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": indices, "references": indices}),
        )

    def _compute(self, predictions, references):
        recalls = []
        for index, (kept, best) in enumerate(zip(predictions, references, strict=True)):
            if not best:
                raise ValueError(f"the oracle keeps no entry in example {index}: expected at least one index")
            recalls.append(len(set(kept) & set(best)) / len(set(best)))
        return {"topk_recall": sum(recalls) / len(recalls)}
