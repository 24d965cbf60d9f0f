"""Reading a text: answering over several paragraphs, explaining, summarizing, continuing."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lkq_hf.evaluation.tasks.base import Draft, Task
from lkq_hf.text.documents import read_rows
from lkq_hf.text.passages import Corpus

EXCERPT = "Excerpt from a book:\n\n{document}\n\n"


class QuestionAnswering(Task):
    """The user's own questions; each one's context is hidden among other paragraphs.

    Args:
        corpus: the documents from which the other paragraphs are taken.
        questions: mappings with ``"question"``, ``"context"`` (a string) and ``"answers"`` (a string or a list).
        seed: see `Task`.

    Raises:
        ValueError: no questions, or one without these fields.
    """

    kind = "question_answering"
    max_new_tokens = 48

    def __init__(self, corpus: Corpus, questions: Sequence[dict[str, Any]], seed: int = 0):
        super().__init__(corpus, seed)
        if not questions:
            raise ValueError("no questions were given; expected at least one")
        for index, question in enumerate(questions):
            missing = {"question", "context", "answers"} - set(question)
            if missing:
                raise ValueError(
                    f"question {index + 1} has no {' or '.join(sorted(missing))}: expected 'question', 'context' and "
                    f"'answers', found {sorted(question)}"
                )
        self.questions = questions

    @classmethod
    def from_jsonl(cls, corpus: Corpus, path: str | Path, seed: int = 0) -> "QuestionAnswering":
        """Reads one question a line."""
        return cls(corpus, [row for _, row in read_rows(Path(path))], seed)

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        passage, contents = self.passage(length, rng)
        question = rng.choice(self.questions)
        answers = question["answers"]
        ends = [place for place in contents.boundaries if contents.text.startswith("\n\n", place)] or [0]
        return Draft(
            passage,
            "Paragraphs:\n\n{document}\n\nAnswer in a few words, from the paragraphs alone: " + question["question"],
            [(rng.choice(ends), f"\n\n{question['context']}")],
            [answers] if isinstance(answers, str) else list(answers),
            "",
        )


class ParagraphQuestion(Task):
    """A word is left out of one of the text's sentences and asked for."""

    kind = "paragraph_question"
    max_new_tokens = 48

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        passage, contents = self.passage(length, rng)
        asked = [(s, term) for s in contents.sentences for term in contents.terms if s.split().count(term) == 1]
        if not asked:
            return None
        sentence, term = rng.choice(asked)
        gap = " ".join("[...]" if word == term else word for word in sentence.split())
        question = (
            f'One sentence of these paragraphs, with a word left out, is: "{gap}" '
            "Which word was left out, and what do the paragraphs tell about it?"
        )
        return Draft(passage, "Some paragraphs to read:\n\n{document}\n\n" + question, (), [term])


class Explain(Task):
    """What the text says about one of its terms; compared with the full cache's own answer."""

    kind = "explain"
    max_new_tokens = 64

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        passage, contents = self.passage(length, rng)
        if not contents.terms:
            return None
        question = f'How would the author of this excerpt explain "{rng.choice(contents.terms)}" to a colleague?'
        return Draft(passage, EXCERPT + question)


class Summarise(Task):
    """A summary, compared with the full cache's own."""

    kind = "summarise"
    max_new_tokens = 64

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        passage, _ = self.passage(length, rng)
        return Draft(passage, EXCERPT + "Give a brief account of what this excerpt covers.")


class Continue(Task):
    """What comes next, compared with the full cache's own continuation."""

    kind = "continue"
    max_new_tokens = 64

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        passage, _ = self.passage(length, rng)
        return Draft(passage, EXCERPT + "What would the author write next? Carry on from there.")
