"""Questions about a text with answers that can be made from it: the turns before the one that a prompt ends with."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..text.passages import Contents
from . import phrasings
from .facts import Fact, draw_facts

MOST_EARLIER_TURNS = 3

TURN_TOKENS = 100
"""About as many tokens does a question with its answer take."""


@dataclass(frozen=True)
class Turn:
    """What was asked before, and what was answered; ``fact`` has to be planted in the text."""

    question: str
    answer: str
    fact: Fact | None = None


def draw_turns(count: int, contents: Contents, taken: Sequence[Fact], rng: random.Random) -> list[Turn]:
    """``count`` turns about different things; fewer if the text offers too little.

    Args:
        count: turns wanted.
        contents: of the text.
        taken: facts that are planted already.
        rng: what draws.
    """
    known = {(fact.owner, fact.attribute) for fact in taken}
    turns: dict[str, Turn] = {}
    for _ in range(4 * count):
        if len(turns) == count:
            break
        make = rng.choice((_about_fact, _about_fact, _about_term, _about_phrase, _about_beginning))
        turn = make(contents, rng)
        if turn is None:
            continue
        if turn.fact is not None:
            if (turn.fact.owner, turn.fact.attribute) in known:
                continue
            known.add((turn.fact.owner, turn.fact.attribute))
        turns.setdefault(turn.answer, turn)
    return list(turns.values())


def _about_fact(contents: Contents, rng: random.Random) -> Turn:
    (fact,) = draw_facts(1, rng)
    answer = rng.choice((f"{fact.answer_start(rng)} {fact.value}.", fact.statement.strip(), fact.value))
    return Turn(fact.question(rng), answer, fact)


def _about_term(contents: Contents, rng: random.Random) -> Turn | None:
    """Answered by the sentences that hold the term."""
    if not contents.terms:
        return None
    term = rng.choice(contents.terms)
    sentences = list(dict.fromkeys(sentence for sentence in contents.sentences if term in sentence))
    if not sentences:
        return None
    fields = {"term": term, "Term": term[:1].upper() + term[1:]}
    return Turn(rng.choice(phrasings.QUESTIONS).format(**fields), " ".join(sentences[: rng.randint(1, 3)]))


_Part = Callable[[list[str], random.Random], tuple[str, str]]
"""From a sentence's words, what is asked about and the answer."""


def _quoting(questions: Sequence[str], field: str, part: _Part) -> Callable[[Contents, random.Random], Turn | None]:
    def make(contents: Contents, rng: random.Random) -> Turn | None:
        if not contents.sentences:
            return None
        asked, answer = part(rng.choice(contents.sentences).split(), rng)
        return Turn(rng.choice(questions).format(**{field: asked}), answer)

    return make


def _phrase(words: list[str], rng: random.Random) -> tuple[str, str]:
    middle = rng.randint(3, len(words) - 3)
    return " ".join(words[middle : middle + rng.randint(2, 4)]), " ".join(words)


def _halves(words: list[str], rng: random.Random) -> tuple[str, str]:
    middle = rng.randint(3, len(words) - 3)
    return " ".join(words[:middle]), " ".join(words[middle:])


_about_phrase = _quoting(phrasings.QUOTE, "phrase", _phrase)
_about_beginning = _quoting(phrasings.CLOZE, "half", _halves)
