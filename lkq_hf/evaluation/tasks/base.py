"""What a task is: seeded prompts of an exact length, and what counts as a right answer."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from lkq_hf.text.chat import encode_chat
from lkq_hf.text.passages import Contents, Corpus, Passage, fit_length, insert


class Example(TypedDict):
    """One prompt.

    ``answer_prefix`` is what the assistant's turn already starts with, and ``input_ids`` holds both as the model reads
    them. ``reference`` lists the strings that a right answer holds; None where an answer is compared with the full
    cache's own.
    """

    messages: list[dict[str, str]]
    answer_prefix: str
    input_ids: list[int]
    reference: list[str] | None
    kind: str
    document: str


@dataclass
class Draft:
    """A prompt whose text is not yet cut: ``frame`` has ``{document}`` where the passage goes."""

    passage: Passage
    frame: str
    insertions: Sequence[tuple[int, str]] = ()
    reference: list[str] | None = None
    answer_prefix: str = ""


class Task(ABC):
    """Prompts of one kind, made from any text.

    Args:
        corpus: the documents, tokenized.
        seed: the same seed, corpus and length give the same prompts; prompt ``index`` depends on nothing else.
    """

    kind: ClassVar[str]
    max_new_tokens: ClassVar[int]

    def __init__(self, corpus: Corpus, seed: int = 0):
        self.corpus = corpus
        self.seed = seed

    @abstractmethod
    def draft(self, length: int, rng: random.Random) -> Draft | None:
        """A prompt for about ``length`` tokens, or None if the drawn passage offers nothing to ask about."""

    def example(self, index: int, length: int) -> Example:
        """Prompt number ``index`` of exactly ``length`` tokens.

        Raises:
            ValueError: the documents do not allow such a prompt.
        """
        rng = random.Random(f"{self.kind}/{self.seed}/{length}/{index}")
        for _ in range(30):
            draft = self.draft(length, rng)
            example = draft and self._fit(draft, length)
            if example:
                return example
        raise ValueError(
            f"could not make a {self.kind!r} prompt of {length} tokens in 30 attempts: the documents offer too little "
            "prose, or the length leaves no room for a text beside the question"
        )

    def examples(self, count: int, length: int) -> Iterator[Example]:
        """Prompts 0 to ``count``, each of exactly ``length`` tokens."""
        return (self.example(index, length) for index in range(count))

    def passage(self, length: int, rng: random.Random) -> tuple[Passage, Contents]:
        """A passage that can fill ``length`` tokens, and the contents of the part that will surely stay in it."""
        passage = self.corpus.passage(length, rng)
        return passage, Contents(passage.first(max(length - 320, length // 3)), self.corpus)

    def _fit(self, draft: Draft, length: int) -> Example | None:
        def build(tokens: int) -> Example:
            text = insert(draft.passage.first(tokens), draft.insertions)
            messages = [{"role": "user", "content": draft.frame.replace("{document}", text)}]
            return Example(
                messages=messages,
                answer_prefix=draft.answer_prefix,
                input_ids=encode_chat(messages, draft.answer_prefix, self.corpus.tokenizer),
                reference=draft.reference,
                kind=self.kind,
                document=draft.passage.document,
            )

        return fit_length(build, length, len(draft.passage.ends))
