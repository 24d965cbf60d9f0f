"""Overlap of words between two texts (the F1 of SQuAD, arXiv 1606.05250)."""

import re
from collections import Counter

import datasets
import evaluate

_DESCRIPTION = """
Harmonic mean of precision and recall over the words of an answer and of its reference, as multisets, in lower case and
without punctuation and English articles. With several references the best one counts.
"""
_INPUTS = """
Args:
    predictions: answers, list of str.
    references: for each answer a string, or a list of strings.
Returns:
    word_f1: mean over the answers, between 0 and 1. Two texts without words agree.
"""


def _words(text: str) -> Counter:
    return Counter(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


def _f1(answer: str, reference: str) -> float:
    words, expected = _words(answer), _words(reference)
    if not words or not expected:
        return float(words == expected)
    return 2 * (words & expected).total() / (words.total() + expected.total())


class WordF1(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references):
        scores = []
        for answer, expected in zip(predictions, references, strict=True):
            expected = [expected] if isinstance(expected, str) else expected
            scores.append(max((_f1(answer, text) for text in expected), default=0.0))
        return {"word_f1": sum(scores) / len(scores)}
