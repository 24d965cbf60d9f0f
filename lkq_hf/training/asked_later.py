"""Prompts that end before anything is asked: what an adapter learns from that is read once and asked about later.

The response to such a prompt is not the model's own. It is what follows in the conversation: several questions about
different places of the text, each with an answer that the text gives. So the importance of an entry is what any of
them looks at, and an eviction is judged by what all of them lose.
"""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from ..text.chat import render_chat
from ..text.passages import Contents, Corpus, fit_length, insert
from . import phrasings
from .earlier_turns import draw_turns

FEWEST_QUESTIONS, MOST_QUESTIONS = 2, 5


class ReadFirst(TypedDict):
    """A prompt without a question, and what is said after it."""

    messages: list[dict[str, str]]
    document: str
    input_ids: list[int]
    response_ids: list[int]


def read_first(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    system: Sequence[dict[str, str]],
    rng: random.Random,
) -> ReadFirst | None:
    """A prompt of ``length`` tokens that ends with a text, and questions with their answers as the response.

    Half of the prompts end inside the user's message, right behind the text, as when a document is read before its
    user has said anything. The others end where the assistant says that it has read the text.

    Args:
        corpus: where the text is taken from.
        tokenizer: the model's; its chat template is used.
        length: tokens of the prompt.
        system: messages before the user's.
        rng: what draws.

    Returns:
        None if the drawn text offers nothing to ask about.
    """
    passage = corpus.passage(length + 32, rng)
    contents = Contents(passage.first(max(length - 320, length // 3)), corpus)
    turns = draw_turns(rng.randint(FEWEST_QUESTIONS, MOST_QUESTIONS), contents, (), rng)
    if len(turns) < FEWEST_QUESTIONS:
        return None
    places = [(rng.choice(contents.boundaries), turn.fact.statement) for turn in turns if turn.fact is not None]
    whole_message = rng.random() < 0.5
    frame = rng.choice(phrasings.READ_FIRST if whole_message else phrasings.TASK_LAST)
    ready = rng.choice(phrasings.READY)

    def build(tokens: int) -> ReadFirst:
        text = insert(passage.first(tokens), places).strip()
        content = frame.replace("{task}", turns[0].question).replace("{document}", text)
        messages = [*system, {"role": "user", "content": content}]
        if whole_message:
            messages += [{"role": "assistant", "content": ready}, {"role": "user", "content": turns[0].question}]
        for turn, following in pairwise(turns):
            messages.append({"role": "assistant", "content": turn.answer})
            messages.append({"role": "user", "content": following.question})
        rendered = render_chat(messages, turns[-1].answer, tokenizer)
        end = rendered.index(text) + len(text)
        if whole_message:
            end = rendered.index(ready, end)
        bare = not tokenizer.chat_template
        read, following_text = rendered[:end], rendered[end:]
        return ReadFirst(
            messages=messages,
            document=passage.document,
            input_ids=tokenizer(read, add_special_tokens=bare, verbose=False)["input_ids"],
            response_ids=tokenizer(following_text, add_special_tokens=False, verbose=False)["input_ids"],
        )

    return fit_length(build, length, len(passage.ends))
