"""Following assignments and counting words over a whole prompt (after RULER, arXiv 2404.06654)."""

import random
import string

from lkq_hf.evaluation.tasks.base import Draft, Task
from lkq_hf.text.passages import WORD, Passage, token_ends


class VariableTracking(Task):
    """A chain of assignments is spread over a text; all names that share the first one's value are asked for."""

    kind = "variable_tracking"
    max_new_tokens = 40
    hops = 3

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        passage, contents = self.passage(length, rng)
        if len(contents.boundaries) <= self.hops:
            return None
        names = ["".join(rng.choices(string.ascii_uppercase, k=4)) for _ in range(self.hops + 1)]
        value = str(rng.randrange(10_000, 100_000))
        # In reading order, so that each name is known before it is used.
        places = sorted(rng.sample(contents.boundaries, len(names)))
        sources = [value, *names]
        question = f"Which variables have the value {value}, directly or through other variables? Name all of them."
        return Draft(
            passage,
            "Variables are assigned at several places of this text.\n\n{document}\n\n" + question,
            [
                (place, f"VAR {name} = {source}.")
                for place, name, source in zip(places, names, sources[:-1], strict=True)
            ],
            names,
            f"The {len(names)} variables with the value {value} are",
        )


class FrequentWords(Task):
    """A long list of words taken from the text, of which three occur far more often than the others."""

    kind = "frequent_words"
    max_new_tokens = 24

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        passage, _ = self.passage(length, rng)
        found = {word.lower() for word in WORD.findall(passage.text) if word.isalpha() and 4 <= len(word) <= 9}
        if len(found) < 20:
            return None
        first, second, third, *others = rng.sample(sorted(found), len(found))
        words: list[str] = []
        while len(words) < length:
            # The ranks hold in every block, so wherever the list is cut they hold in the whole.
            block = [first] * 5 + [second] * 4 + [third] * 3 + rng.sample(others, min(len(others), 12))
            words += rng.sample(block, len(block))
        text = ", ".join(words)
        return Draft(
            Passage(text, token_ends(text, self.corpus.tokenizer), passage.document),
            "Here is a list of words.\n\n{document}\n\nWhich three words occur most often in the list?",
            (),
            [first, second, third],
            "The three words that occur most often are:",
        )
