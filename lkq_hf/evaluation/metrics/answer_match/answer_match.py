"""Share of the expected strings that an answer contains (the string match of RULER, arXiv 2404.06654)."""

import re

import datasets
import evaluate

_DESCRIPTION = """
An answer is right to the share of its expected strings that it contains, as whole words, whatever their case.
With ``match="any"`` one of them is enough, for questions with several acceptable answers.
"""
_INPUTS = """
Args:
    predictions: answers, list of str.
    references: for each answer a string, or a list of strings.
    match: "all" (share of the strings found) or "any".
Returns:
    answer_match: mean over the answers, between 0 and 1.
Raises:
    ValueError: another value of ``match``, or an answer without expected strings.
"""


def _contains(answer: str, expected: str) -> bool:
    # Not inside a longer word or number: 1234 is not an answer where 12345 is written.
    words = r"\s+".join(re.escape(word) for word in expected.split())
    return re.search(rf"(?<!\w){words}(?!\w)", answer, re.IGNORECASE) is not None


class AnswerMatch(evaluate.Metric):
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

    def _compute(self, predictions, references, match="all"):
        if match not in ("all", "any"):
            raise ValueError(f'match must be "all" or "any", got {match!r}')
        scores = []
        for index, (answer, expected) in enumerate(zip(predictions, references, strict=True)):
            expected = [expected] if isinstance(expected, str) else expected
            if not expected or not all(text.strip() for text in expected):
                raise ValueError(f"the references of answer {index} are empty: expected at least one string of words")
            found = [_contains(answer, text) for text in expected]
            scores.append(float(any(found)) if match == "any" else sum(found) / len(found))
        return {"answer_match": sum(scores) / len(scores)}
