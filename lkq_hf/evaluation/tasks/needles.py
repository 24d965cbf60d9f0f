"""Finding numbers planted in a text (after RULER, arXiv 2404.06654, and "needle in a haystack")."""

import random

from lkq_hf.evaluation.tasks.base import Draft, Task


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


ADJECTIVES = _listed("amused brisk curious drowsy eager frosty gentle hollow idle jolly lofty mellow nimble quiet")
NOUNS = _listed("acorn bridge candle dragon engine feather garden hammer island jacket kettle ladder mirror orchard")

STATEMENT = "One special magic number for {key} is: {value}."
FRAME = (
    "Special magic numbers are hidden in the following text. Memorise them: there will be a quiz.\n\n{document}\n\n"
    "{question}"
)
ONE_VALUE = ("What is the special magic number for {key} in the text above?", "The special magic number for {key} is")
ALL_VALUES = (
    "What are all the special magic numbers for {key} in the text above?",
    "The special magic numbers for {key} are",
)


class Needle(Task):
    """One number is planted and asked for."""

    kind = "needle"
    max_new_tokens = 16
    keys = 1
    values_per_key = 1

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        passage, contents = self.passage(length, rng)
        pairs = rng.sample([(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS], self.keys)
        names = [f"{adjective}-{noun}" for adjective, noun in pairs]
        planted = [(name, _number(rng)) for name in names for _ in range(self.values_per_key)]
        question, answer_prefix = ONE_VALUE if self.values_per_key == 1 else ALL_VALUES
        return Draft(
            passage,
            FRAME.replace("{question}", question.format(key=names[0])),
            [(rng.choice(contents.boundaries), STATEMENT.format(key=key, value=value)) for key, value in planted],
            [value for key, value in planted if key == names[0]],
            answer_prefix.format(key=names[0]),
        )


class NeedleMultiKey(Needle):
    """Four numbers are planted for four keys; one is asked for."""

    kind = "needle_multi_key"
    keys = 4


class NeedleMultiValue(Needle):
    """Three numbers are planted for one key; all are asked for."""

    kind = "needle_multi_value"
    max_new_tokens = 48
    values_per_key = 3


def _number(rng: random.Random) -> str:
    digits = rng.randint(5, 7)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
