"""Planted facts: statements with made-up owners and values that cannot be known without reading the text."""

import random
import string
from dataclasses import dataclass

from . import phrasings


@dataclass(frozen=True)
class Fact:
    """Some owner has an attribute of some value, said in a statement."""

    owner: str
    attribute: str
    value: str
    statement: str

    def _fill(self, template: str) -> str:
        owner = self.owner
        fields = {"owner": owner, "Owner": owner[:1].upper() + owner[1:], "attribute": self.attribute}
        return template.format(**fields, value=self.value)

    def question(self, rng: random.Random) -> str:
        return self._fill(rng.choice(phrasings.FACT_QUESTIONS))

    def answer_start(self, rng: random.Random, inside_value: bool = False) -> str:
        """The first words of an answer; with ``inside_value`` also the first characters of the value."""
        start = self._fill(rng.choice(phrasings.FACT_ANSWER_STARTS))
        if inside_value and len(self.value) > 1:
            known = self.value[: rng.randint(1, len(self.value) - 1)].rstrip()
            return rng.choice((f"{start} {known}", known))
        return start


def draw_facts(count: int, rng: random.Random) -> list[Fact]:
    """``count`` facts, no two of which share both owner and attribute.

    Half of the time all have the same attribute, or the same kind of owner, so that they are easily confused.
    """
    statements = rng.sample(phrasings.STATEMENTS, 1) if rng.random() < 0.3 else phrasings.STATEMENTS
    attributes = _draw_attributes(rng)
    same_attribute = rng.random() < 0.5
    owners = (
        rng.choice(phrasings.OWNERS)
        if rng.random() < 0.5
        else tuple(owner for kind in phrasings.OWNERS for owner in kind)
    )
    facts: dict[tuple[str, str], Fact] = {}
    while len(facts) < count:
        if not same_attribute:
            attributes = _draw_attributes(rng)
        owner = rng.choice(owners)
        kind, attribute = attributes
        fact = Fact(owner, attribute, _draw_value(kind, rng), "")
        facts.setdefault((owner, attribute), Fact(owner, attribute, fact.value, fact._fill(rng.choice(statements))))
    return list(facts.values())


def _draw_attributes(rng: random.Random) -> tuple[str, str]:
    kind = rng.choices(("number", "word", "date", "name"), (6, 2, 1, 1))[0]
    attributes = {
        "number": phrasings.NUMBER_ATTRIBUTES,
        "word": phrasings.WORD_ATTRIBUTES,
        "date": phrasings.DATE_ATTRIBUTES,
        "name": phrasings.NAME_ATTRIBUTES,
    }[kind]
    return kind, rng.choice(attributes)


def _draw_value(kind: str, rng: random.Random) -> str:
    if kind == "word":
        return " ".join(rng.sample(phrasings.WORDS, rng.choice((1, 1, 2))))
    if kind == "name":
        return rng.choice(phrasings.PERSONS)
    if kind == "date":
        month = rng.choice(phrasings.MONTHS)
        day, year = rng.randint(1, 28), rng.randint(1890, 2060)
        return rng.choice(
            (f"{day} {month} {year}", f"{month} {day}, {year}", f"{year}-{rng.randint(1, 12):02d}-{day:02d}")
        )
    digits = rng.randint(3, 8)
    number = rng.randrange(10 ** (digits - 1), 10**digits)
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))
    return rng.choices((f"{number}", f"{number:,}", f"{letters}-{number}", f"{letters}{number}"), (7, 1, 1, 1))[0]
