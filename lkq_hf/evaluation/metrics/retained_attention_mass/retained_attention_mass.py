"""How much of the answer's attention goes to entries that were kept."""

import datasets
import evaluate

_DESCRIPTION = """
Share of the attention of an answer to its prompt that falls on the entries which an eviction kept. One example is one
KV head of one layer of one prompt.
"""
_INPUTS = """
Args:
    predictions: indices of the kept entries of each KV head, list of list of int.
    references: attention of the answer to each prompt entry (any scale), list of list of float.
Returns:
    retained_attention_mass: mean over the KV heads, between 0 and 1.
Raises:
    ValueError: an index outside the prompt, or attention that sums to zero.
"""


class RetainedAttentionMass(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions, references):
        shares = []
        for index, (kept, attention) in enumerate(zip(predictions, references, strict=True)):
            total = sum(attention)
            if total <= 0:
                raise ValueError(f"the attention of example {index} sums to {total}: expected a positive sum")
            if kept and not 0 <= min(kept) <= max(kept) < len(attention):
                raise ValueError(f"example {index} keeps entries outside its prompt of {len(attention)} entries")
            shares.append(sum(attention[entry] for entry in set(kept)) / total)
        return {"retained_attention_mass": sum(shares) / len(shares)}
