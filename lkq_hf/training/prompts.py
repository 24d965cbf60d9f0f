"""Training prompts for a lookahead adapter, made from any documents.

The adapter learns which parts of a prompt the model's own answer will look at. So the mix holds the kinds of use that
differ in where the answer looks: planted facts, questions over several paragraphs, explaining, summarizing, comparing,
quoting, copying and continuing; with the task before or after the text, in a later turn of a conversation about it,
and with prompts that end inside an answer.

    documents = [{"document": "manual", "text": "..."}, ...]
    train, validation = split_documents(documents, validation_fraction=0.05)
    for prompt in build_prompts(train, tokenizer, count=6000):
        prompt["input_ids"]
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, TypedDict

from transformers import PreTrainedTokenizerBase

from ..text.chat import encode_chat
from ..text.passages import Contents, Corpus, Passage, fit_length, insert, token_ends
from . import phrasings
from .asked_later import read_first
from .earlier_turns import MOST_EARLIER_TURNS, TURN_TOKENS, draw_turns
from .facts import Fact, draw_facts

logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS: Mapping[str, float] = {
    "fact": 3.0,  # one planted fact
    "fact_among_several": 4.0,  # several, of which one is asked for
    "all_facts": 1.5,
    "question": 3.0,  # what the text says about something
    "documents": 2.0,  # the same over numbered documents
    "section": 0.7,
    "quote": 1.0,
    "cloze": 1.0,
    "explain": 1.5,
    "compare": 1.0,
    "summarise": 2.0,
    "summarise_part": 0.7,
    "copy": 0.8,
    "continue": 1.5,
    "raw": 1.0,  # plain text without any chat
}


@dataclass(frozen=True)
class PromptMix:
    """How many prompts of which kind and length.

    Args:
        weights: relative frequency of each kind (see ``DEFAULT_WEIGHTS``, whose keys are all kinds there are).
        min_length: shortest prompt, in tokens, the chat template and the answer's beginning included.
        max_length: longest prompt.
        length_skew: lengths are drawn with density ``length ** -(1 + length_skew)``: 0 is log-uniform, above it short
            prompts are more frequent (0.35 over 512..8192: 62 % have at most 2,048 tokens).
        length_step: lengths are multiples of this, so that batches of one length can be formed.
        answer_start_share: share of prompts that end inside an answer, where the kind allows it.
        task_first_share: share of prompts with the task before the text (a quarter of these have it on both sides).
        system_prompt_share: share of prompts with a system prompt of their own.
        later_turn_share: share of prompts whose task comes in a later turn, after one to three other questions about
            the text and their answers.
        asked_later_share: share of prompts that end before anything is asked
            (`read_first`). 1 trains an adapter for texts that are read once and
            asked about later; such prompts come with their responses.
        seed: the same seed, documents and tokenizer give the same prompts.

    Raises:
        ValueError: an unknown kind, no positive weight, or lengths that cannot be drawn.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    min_length: int = 512
    max_length: int = 8192
    length_skew: float = 0.35
    length_step: int = 1
    answer_start_share: float = 0.35
    task_first_share: float = 0.25
    system_prompt_share: float = 0.5
    later_turn_share: float = 0.2
    asked_later_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(DEFAULT_WEIGHTS))
        if unknown:
            raise ValueError(f"unknown kinds of prompts {unknown}; expected some of {sorted(DEFAULT_WEIGHTS)}")
        if min(self.weights.values(), default=0) < 0 or sum(self.weights.values()) <= 0:
            raise ValueError("weights must not be negative, and at least one must be positive")
        if not 256 <= self.min_length <= self.max_length:
            raise ValueError(
                f"expected 256 <= min_length <= max_length, got {self.min_length} and {self.max_length}; "
                "shorter prompts have no room for a task and a text"
            )
        if self.length_step < 1 or self.max_length // self.length_step * self.length_step < self.min_length:
            raise ValueError(
                f"no multiple of length_step={self.length_step} lies between {self.min_length} and {self.max_length}"
            )

    def draw_length(self, rng: random.Random) -> int:
        u = rng.random()
        if self.length_skew:
            low, high = self.min_length**-self.length_skew, self.max_length**-self.length_skew
            length = (low + u * (high - low)) ** (-1 / self.length_skew)
        else:
            length = self.min_length * (self.max_length / self.min_length) ** u
        lowest = -(-self.min_length // self.length_step)
        highest = self.max_length // self.length_step
        return min(max(round(length / self.length_step), lowest), highest) * self.length_step


ASKED_LATER = "asked_later"
"""The kind of the prompts that end before anything is asked."""


class Prompt(TypedDict):
    """One prompt.

    ``messages`` are chat messages (empty for plain text); ``answer_prefix`` is what the assistant's turn, or the plain
    text, already starts with; ``input_ids`` are both as the model reads them. ``response_ids`` is empty where the
    model answers for itself.
    """

    messages: list[dict[str, str]]
    answer_prefix: str
    kind: str
    document: str
    input_ids: list[int]
    response_ids: list[int]


@dataclass
class _Task:
    """What is asked about a text."""

    text: str
    answer_starts: Sequence[str] = ()
    facts: Sequence[Fact] = ()


def split_documents(
    documents: Sequence[dict[str, Any]], validation_fraction: float = 0.05, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parts documents into training and validation ones; each document is whole in one of the two.

    Copies of a text are left out, with a warning: they would be in both parts. Validation gets random documents of
    each ``"source"``, up to the given fraction of its characters and at least one in all.

    Raises:
        ValueError: the fraction is not between 0 and 1, or there are fewer than two different documents.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    different: dict[str, dict[str, Any]] = {}
    for document in documents:
        different.setdefault(document["text"].strip(), document)
    given, documents = len(documents), list(different.values())
    copies = given - len(documents)
    if len(documents) < 2:
        found = f"{given} copies of one" if copies else given
        raise ValueError(
            f"at least two different documents are needed, since one is held out whole for validation; got {found}. "
            'Split a long one, for example by chapter: a .jsonl file with one {"text": "..."} a line'
        )
    if copies:
        logger.warning("%d of %d documents are copies of others and were left out", copies, given)
    rng = random.Random(seed)
    by_source: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        by_source.setdefault(str(document.get("source", "")), []).append(index)
    held_out: set[int] = set()
    for indices in by_source.values():
        room = validation_fraction * sum(len(documents[index]["text"]) for index in indices)
        for index in rng.sample(indices, len(indices)):
            if len(documents[index]["text"]) <= room:
                room -= len(documents[index]["text"])
                held_out.add(index)
    if not held_out:
        held_out.add(min(range(len(documents)), key=lambda index: len(documents[index]["text"])))
    train = [document for index, document in enumerate(documents) if index not in held_out]
    return train, [documents[index] for index in sorted(held_out)]


def build_prompts(
    documents: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    mix: PromptMix | None = None,
) -> Iterator[Prompt]:
    """``count`` prompts from the documents, each of exactly the length that was drawn for it.

    Raises:
        ValueError: no documents, a document without text, or a tokenizer without character offsets.
    """
    builder = PromptBuilder(documents, tokenizer, mix)
    for index in range(count):
        yield builder.prompt(index)


def build_prompts_in_parallel(
    documents: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    mix: PromptMix | None = None,
    workers: int = 1,
) -> list[Prompt]:
    """The prompts of `build_prompts`, made by several processes."""
    # Documents are tokenized here, once, and not by every worker again.
    builder = PromptBuilder(documents, tokenizer, mix)
    if workers == 1:
        return [builder.prompt(index) for index in range(count)]
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (builder,)) as pool:
        return list(pool.map(_prompt_in_worker, range(count), chunksize=16))


_worker_builder: "PromptBuilder"


def _start_worker(builder: "PromptBuilder") -> None:
    global _worker_builder
    _worker_builder = builder


def _prompt_in_worker(index: int) -> Prompt:
    return _worker_builder.prompt(index)


class PromptBuilder:
    """Builds training prompts; prompt ``index`` depends on the seed and the index alone.

    Args:
        documents: mappings with ``"text"`` and optionally ``"document"``, a name.
        tokenizer: the model's fast tokenizer; its chat template is used.
        mix: kinds and lengths.
    """

    def __init__(
        self, documents: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, mix: PromptMix | None = None
    ):
        self.mix = mix or PromptMix()
        self.tokenizer = tokenizer
        self.corpus = Corpus(documents, tokenizer)

    def prompt(self, index: int, kind: str | None = None, length: int | None = None) -> Prompt:
        """The prompt of this index; ``kind`` and ``length`` (tokens) are drawn from the mix if not given.

        Raises:
            ValueError: an unknown kind, or no prompt of this kind and length could be made from the documents.
        """
        rng = random.Random(f"{self.mix.seed}/{index}")
        length = length or self.mix.draw_length(rng)
        if kind is not None and kind not in DEFAULT_WEIGHTS:
            raise ValueError(f"unknown kind of prompt {kind!r}; expected one of {sorted(DEFAULT_WEIGHTS)}")
        asked_later = kind is None and self.mix.asked_later_share > 0 and rng.random() < self.mix.asked_later_share
        for _ in range(30):
            if asked_later:
                built = self._asked_later(length, rng)
            else:
                (drawn,) = [kind] if kind else rng.choices(list(self.mix.weights), list(self.mix.weights.values()))
                built = self._build(drawn, length, rng)
            if built is not None:
                return built
        raise ValueError(
            f"could not make a prompt{f' of kind {kind!r}' if kind else ''} of {length} tokens in 30 attempts: "
            "the documents offer too little prose, or the length leaves no room for a text"
        )

    def _build(self, kind: str, length: int, rng: random.Random) -> Prompt | None:
        turns = 0
        if kind != "raw" and self.mix.later_turn_share and rng.random() < self.mix.later_turn_share:
            turns = rng.randint(1, max(1, min(MOST_EARLIER_TURNS, length // 512)))
        pieces = rng.randint(2, max(2, min(10, length // 200))) if kind == "documents" else 1
        passage = self._numbered(length, pieces, rng) if pieces > 1 else self.corpus.passage(length + 32, rng)
        # Ask only about what stays in the passage when task, chat template and facts have taken their room.
        contents = Contents(passage.first(max(length - 320 - TURN_TOKENS * turns, length // 3)), self.corpus)
        task = _TASKS[kind](contents, rng, pieces) if kind != "raw" else _Task("")
        if task is None:
            return None
        earlier = draw_turns(turns, contents, task.facts, rng)
        answer_prefix = ""
        if task.answer_starts and rng.random() < self.mix.answer_start_share:
            answer_prefix = rng.choice(task.answer_starts)
        frame = self._frame(rng)
        system = self._system(rng)
        facts = [*task.facts, *(turn.fact for turn in earlier if turn.fact is not None)]
        places = [(rng.choice(contents.boundaries), fact.statement) for fact in facts]
        first_task, *later_tasks = [turn.question for turn in earlier] + [task.text]

        def build(tokens: int) -> Prompt:
            text = insert(passage.first(tokens), places)
            messages: list[dict[str, str]] = []
            start = text if kind == "raw" else answer_prefix
            if kind != "raw":
                content = frame.replace("{task}", first_task).replace("{document}", text)
                messages = [*system, {"role": "user", "content": content}]
                for turn, question in zip(earlier, later_tasks, strict=True):
                    messages.append({"role": "assistant", "content": turn.answer})
                    messages.append({"role": "user", "content": question})
            return Prompt(
                messages=messages,
                answer_prefix=start,
                kind=kind,
                document=passage.document,
                input_ids=encode_chat(messages, start, self.tokenizer),
                response_ids=[],
            )

        return fit_length(build, length, len(passage.ends))

    def _asked_later(self, length: int, rng: random.Random) -> Prompt | None:
        built = read_first(self.corpus, self.tokenizer, length, self._system(rng), rng)
        return built and Prompt(kind=ASKED_LATER, answer_prefix="", **built)

    def _system(self, rng: random.Random) -> list[dict[str, str]]:
        if rng.random() >= self.mix.system_prompt_share:
            return []
        return [{"role": "system", "content": rng.choice(phrasings.SYSTEM_PROMPTS)}]

    def _frame(self, rng: random.Random) -> str:
        if rng.random() >= self.mix.task_first_share:
            return rng.choice(phrasings.TASK_LAST)
        return rng.choice(phrasings.TASK_FIRST if rng.random() < 0.75 else phrasings.TASK_TWICE)

    def _numbered(self, length: int, pieces: int, rng: random.Random) -> Passage:
        header = rng.choice(phrasings.DOCUMENT_HEADERS)
        passages = [self.corpus.passage((length + 64) // pieces + 1, rng) for _ in range(pieces)]
        numbered = (
            header.format(number=number, text=passage.text.strip()) for number, passage in enumerate(passages, start=1)
        )
        text = "\n\n".join(numbered)
        return Passage(text, token_ends(text, self.tokenizer), passages[0].document)


def _facts(count: Callable[[random.Random, int], int], ask_all: bool) -> Callable[..., _Task]:
    def make(contents: Contents, rng: random.Random, _: int) -> _Task:
        facts = draw_facts(count(rng, len(contents.text)), rng)
        if ask_all:
            requests = ", ".join(f"the {fact.attribute} of {fact.owner}" for fact in facts)
            question = rng.choice(phrasings.ALL_FACTS_QUESTIONS).format(requests=requests)
            starts = [
                facts[0].answer_start(rng),
                f"1. The {facts[0].attribute} of {facts[0].owner} is",
                "Here they are:\n",
            ]
            return _Task(question, starts, facts)
        asked = facts[0]
        question = asked.question(rng) + rng.choice(("", "", "", " Only the answer, please.", " Answer briefly."))
        return _Task(question, [asked.answer_start(rng), asked.answer_start(rng, inside_value=True)], facts)

    return make


def _about_term(questions: Sequence[str], starts: Sequence[str]) -> Callable[..., _Task | None]:
    def make(contents: Contents, rng: random.Random, pieces: int) -> _Task | None:
        if len(contents.terms) < 2:
            return None
        term, other = rng.sample(contents.terms, 2)
        fields = {"term": term, "Term": term[:1].upper() + term[1:], "other": other, "number": rng.randint(1, pieces)}
        question = rng.choice(questions).format(**fields) + rng.choice(phrasings.STYLES)
        return _Task(question, [start.format(**fields) for start in starts])

    return make


def _about_section(contents: Contents, rng: random.Random, pieces: int) -> _Task | None:
    return (
        _about_term(phrasings.SECTIONS, phrasings.SECTION_STARTS)(contents, rng, pieces) if contents.headings else None
    )


def _about_sentence(questions: Sequence[str], quoted: bool) -> Callable[..., _Task | None]:
    def make(contents: Contents, rng: random.Random, _: int) -> _Task | None:
        if not contents.sentences:
            return None
        sentence = rng.choice(contents.sentences)
        words = sentence.split()
        middle = rng.randint(3, len(words) - 3)
        if quoted:
            fields = {"phrase": " ".join(words[middle : middle + rng.randint(2, 4)])}
            start = " ".join(words[: rng.randint(1, 4)])
        else:
            fields = {"half": " ".join(words[:middle])}
            start = " ".join(words[middle : middle + rng.randint(1, 2)])
        return _Task(rng.choice(questions).format(**fields), [start, f'"{start}'])

    return make


def _about_paragraph(questions: Sequence[str], copied: bool) -> Callable[..., _Task | None]:
    def make(contents: Contents, rng: random.Random, _: int) -> _Task | None:
        if not contents.paragraphs:
            return None
        words = rng.choice(contents.paragraphs).split()
        beginning = rng.randint(4, 9)
        starts = [" ".join(words[: beginning + rng.randint(0, 6)]), '"' + " ".join(words[:3])]
        question = rng.choice(questions).format(beginning=" ".join(words[:beginning]))
        return _Task(question, starts if copied else phrasings.SUMMARISE_STARTS)

    return make


def _summarise(contents: Contents, rng: random.Random, _: int) -> _Task:
    return _Task(rng.choice(phrasings.SUMMARISE) + rng.choice(phrasings.STYLES), phrasings.SUMMARISE_STARTS)


def _continue(contents: Contents, rng: random.Random, _: int) -> _Task:
    return _Task(rng.choice(phrasings.CONTINUE), ())


def _several(rng: random.Random, characters: int) -> int:
    return rng.randint(2, max(3, min(10, characters // 600)))


_TASKS: Mapping[str, Callable[[Contents, random.Random, int], _Task | None]] = {
    "fact": _facts(lambda rng, _: 1, ask_all=False),
    "fact_among_several": _facts(_several, ask_all=False),
    "all_facts": _facts(lambda rng, characters: min(_several(rng, characters), 5), ask_all=True),
    "question": _about_term(phrasings.QUESTIONS, phrasings.QUESTION_STARTS),
    "documents": _about_term(phrasings.DOCUMENT_QUESTIONS, phrasings.QUESTION_STARTS),
    "section": _about_section,
    "quote": _about_sentence(phrasings.QUOTE, quoted=True),
    "cloze": _about_sentence(phrasings.CLOZE, quoted=False),
    "explain": _about_term(phrasings.EXPLAIN, phrasings.EXPLAIN_STARTS),
    "compare": _about_term(phrasings.COMPARE, phrasings.COMPARE_STARTS),
    "summarise": _summarise,
    "summarise_part": _about_paragraph(phrasings.SUMMARISE_PART, copied=False),
    "copy": _about_paragraph(phrasings.COPY, copied=True),
    "continue": _continue,
}
