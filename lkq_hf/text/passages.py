"""Cutting documents into passages of a wanted number of tokens, and finding in a passage what one can ask about."""

import math
import random
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

Built = TypeVar("Built", bound=Mapping[str, Any])

WORD = re.compile(r"[A-Za-z_][\w.-]*\w")
PROPER_NAME = re.compile(r"\b[A-Z][a-z]+(?: [A-Z][a-z]+)+\b")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[A-Z\"'(])|\n\n")


def cut(text: str, ends: Sequence[int], tokens: int) -> str:
    """The first ``tokens`` tokens of a text whose tokens end at the characters ``ends``."""
    return text[: ends[min(tokens, len(ends)) - 1]] if tokens > 0 and ends else ""


def token_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> array:
    """The character at which each token of ``text`` ends.

    Raises:
        ValueError: the tokenizer knows no character offsets.
    """
    (ends,) = _ends_of_all([text], tokenizer)
    return ends


def _ends_of_all(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[array]:
    """`token_ends` of several texts, which the tokenizer reads in parallel."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"cutting documents by tokens needs a fast tokenizer, got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [array("I", (end for _, end in offsets)) for offsets in encoded["offset_mapping"]]


def fit_length(build: Callable[[int], Built], length: int, most: int) -> Built | None:
    """Finds how many tokens of a passage make a prompt exactly ``length`` tokens long.

    Args:
        build: makes the prompt with that many tokens of the passage; its ``"input_ids"`` are counted.
        length: tokens wanted.
        most: tokens that the passage has.

    Returns:
        the prompt, or None if the passage is too short or merges of tokens at its seams skip this length.
    """
    # Every guess is tokenized whole; knowing the length of all that is around the passage, the first is nearly right.
    probe = min(16, most)
    tokens = min(length - (len(build(probe)["input_ids"]) - probe), most)
    if tokens <= 0:
        return None
    for _ in range(8):
        built = build(tokens)
        missing = length - len(built["input_ids"])
        if not missing:
            return built
        tokens += missing
        if not 0 < tokens <= most:
            return None
    return None


def insert(text: str, places: Sequence[tuple[int, str]]) -> str:
    """Puts statements after the given characters of a text (at its end, if it is shorter), parted by a space."""
    parts = []
    done = 0
    for place, statement in sorted(places):
        place = min(place, len(text))
        parted = place == 0 or text[place - 1].isspace() or statement[0].isspace()
        parts += [text[done:place], "" if parted else " ", statement]
        done = place
    return "".join([*parts, text[done:]])


@dataclass
class Passage:
    """A text and the characters at which its tokens end."""

    text: str
    ends: Sequence[int]
    document: str

    def first(self, tokens: int) -> str:
        return cut(self.text, self.ends, tokens)


class Corpus:
    """Documents, tokenized once, from which passages of any token length are cut.

    Args:
        documents: mappings with ``"text"`` and, if wanted, ``"document"`` (a name) and ``"source"``.
        tokenizer: the model's (fast) tokenizer.

    Attributes:
        tokens: tokens of all different texts together, more than which no passage can have.

    Raises:
        ValueError: no documents, or one without text.
    """

    def __init__(self, documents: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase):
        self.texts = []
        self.names = []
        for index, document in enumerate(documents):
            text = document.get("text")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f'document {index} has no text: expected {{"text": "..."}}, not blank, got keys {list(document)}'
                )
            self.texts.append(text)
            self.names.append(str(document.get("document", index)))
        if not self.texts:
            raise ValueError("no documents were given; prompts are made from at least one")
        self.tokenizer = tokenizer
        self.ends = _ends_of_all(self.texts, tokenizer)
        self.tokens = sum(map(len, dict(zip(self.texts, self.ends, strict=True)).values()))
        # Between one draw per document (short ones too often) and one per token (few long ones dominate).
        self._weights = [math.sqrt(len(ends)) for ends in self.ends]
        self._frequency = Counter(word for text in self.texts for word in set(WORD.findall(text.lower())))

    def rarity(self, word: str) -> float:
        """Inverse document frequency of a word (higher: fewer documents have it)."""
        return math.log((1 + len(self.texts)) / (self._frequency[word.lower()] or 1))

    def passage(self, tokens: int, rng: random.Random) -> Passage:
        """``tokens`` tokens from the start of a random paragraph; short documents are joined with the next ones.

        Raises:
            ValueError: the documents hold fewer tokens; no text is repeated to fill a passage.
        """
        if tokens > self.tokens:
            raise ValueError(
                f"the texts hold {self.tokens} tokens, copies not counted, fewer than the {tokens} of a prompt, which "
                "would repeat them: give more text, or ask for shorter prompts"
            )
        (index,) = rng.choices(range(len(self.texts)), self._weights)
        spare = len(self.ends[index]) - tokens
        start = 0
        if spare > 0:
            start = self.ends[index][rng.randrange(spare)]
            start = self.texts[index].rfind("\n\n", 0, start) + 2 if "\n\n" in self.texts[index][:start] else 0
        document = self.names[index]
        text, ends = self._from(index, start, tokens)
        read = {self.texts[index]}
        while len(ends) < tokens:
            index = (index + 1) % len(self.texts)
            if self.texts[index] in read:
                continue  # a copy
            read.add(self.texts[index])
            more, more_ends = self._from(index, 0, tokens)
            shift = len(text) + 2
            text = f"{text}\n\n{more}"
            ends = array("I", [*ends, *(shift + end for end in more_ends)])
        return Passage(text[: ends[tokens - 1]], ends[:tokens], document)

    def _from(self, index: int, start: int, tokens: int) -> tuple[str, array]:
        first = bisect_right(self.ends[index], start)
        ends = self.ends[index][first : first + tokens]
        return self.texts[index][start : ends[-1]], array("I", (end - start for end in ends))


class Contents:
    """What one can ask about in a text: its terms, sentences, paragraphs and headings."""

    def __init__(self, text: str, corpus: Corpus):
        self.text = text
        self.corpus = corpus

    @cached_property
    def paragraphs(self) -> list[str]:
        """Paragraphs of prose, of at least 20 words."""
        found = (paragraph.strip() for paragraph in self.text.split("\n\n"))
        return [paragraph for paragraph in found if len(paragraph.split()) >= 20 and paragraph[:1].isalpha()]

    @cached_property
    def headings(self) -> list[str]:
        found = (paragraph.strip() for paragraph in self.text.split("\n\n"))
        return [
            p for p in found if 1 <= len(p.split()) <= 9 and p[:1].isalnum() and p[-1:].isalnum() and "\n" not in p
        ]

    @cached_property
    def sentences(self) -> list[str]:
        found = (s.strip() for paragraph in self.paragraphs for s in SENTENCE_END.split(paragraph))
        return [sentence for sentence in found if 8 <= len(sentence.split()) <= 45]

    @cached_property
    def terms(self) -> list[str]:
        """Words and names that are frequent here and rare elsewhere, the most telling first."""
        count = Counter(word for word in WORD.findall(self.text) if len(word) >= 4)
        names = Counter(PROPER_NAME.findall(self.text))
        score = {word: n * self.corpus.rarity(word) for word, n in count.items()}
        score.update(
            {name: 2.0 * n * max(map(self.corpus.rarity, name.split())) for name, n in names.items() if n > 1}
        )
        return sorted(score, key=lambda word: (-score[word], word))[:16]

    @cached_property
    def boundaries(self) -> list[int]:
        """Characters after which a sentence ends: where one can be inserted."""
        return [match.start() for match in SENTENCE_END.finditer(self.text)] or [len(self.text)]
