"""Prompts and measures that comparisons of caches share: planted facts, and agreement with the full cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lkq_hf.evaluation.metrics import load_metric
from lkq_hf.evaluation.tasks import Corpus, Example, build_task
from lkq_hf.text.documents import read_documents

FACT_TASKS = ("needle", "needle_multi_key")
AGREEMENT_TASKS = ("paragraph_question", "summarise")


class Prompts:
    """Prompts of an exact length, always the same for the same texts.

    Args:
        texts: files of documents, as texts.py writes them.
        tokenizer: of the model.
        source: of the documents that open questions are asked about; all of them have planted facts.
        seed: of the choice of passages.
    """

    def __init__(self, texts: Sequence[Path], tokenizer: Any, source: str | None = None, seed: int = 0) -> None:
        documents = read_documents(texts)
        chosen = [document for document in documents if source in (None, document.get("source"))]
        if not chosen:
            sources = sorted({document.get("source", "") for document in documents})
            raise SystemExit(f"no document has the source {source!r}: choose one of {sources}")
        self.everything, self.book, self.seed = Corpus(documents, tokenizer), Corpus(chosen, tokenizer), seed

    def facts(self, kind: str, count: int, length: int) -> tuple[list[Example], int]:
        """Examples with planted facts, and the tokens of an answer."""
        task = build_task(kind, self.everything, self.seed)
        return list(task.examples(count, length)), task.max_new_tokens

    def open(self, kind: str, count: int, length: int, shift: int = 0) -> list[Example]:
        """Examples whose answers have no reference; another ``shift`` gives other ones."""
        return list(build_task(kind, self.book, self.seed + shift).examples(count, length))


def answer_rows(
    texts: Mapping[str, Sequence[str]], references: Sequence[list[str] | None], full: str = "full"
) -> dict[str, dict[str, float]]:
    """Measures of each method's answers.

    Args:
        texts: answers by method; those of the full cache under ``full``.
        references: what a right answer holds; None for open questions.

    Returns:
        By method: ``word_f1`` to the full cache's answers and, with references, ``accuracy`` and the share of the full
        cache's that is ``kept``.
    """
    match, f1 = load_metric("answer_match"), load_metric("word_f1")
    rows: dict[str, dict[str, float]] = {}
    for name in sorted(texts, key=lambda name: name != full):
        rows[name] = f1.compute(predictions=texts[name], references=texts[full])
        if all(references):
            accuracy = match.compute(predictions=texts[name], references=references)["answer_match"]
            rows[name]["accuracy"] = accuracy
            if rows[full]["accuracy"]:
                rows[name]["kept"] = accuracy / rows[full]["accuracy"]
    return {name: rows[name] for name in texts}
