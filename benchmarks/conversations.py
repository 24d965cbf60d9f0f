"""Conversations over one text: a different planted fact is asked for in each of 8 turns.

    python benchmarks/texts.py debian-handbook_*.deb fortunes_*.deb --out test.jsonl.gz
    python benchmarks/conversations.py --texts test.jsonl.gz \
        --adapter model_cards/smollm2-135m-instruct-lookahead --out benchmarks/results/conversations

Methods: the full cache; LookaheadKV and SnapKV, each with entries parked in main memory and without; sinks + recent.
With ``--read-first`` the text is read, and evicted, before anything is asked, once for all methods; nothing is parked.
Each reports the share of right answers by turn, and the bytes of its cache on the model's device after each turn.
Writes OUT.json; pages.py writes the table. ``--small`` is a smoke test for a CPU.
"""

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, answer, parser, real_model, save
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import Cache

from lkq_hf import LookaheadCache
from lkq_hf.evaluation.decoding import pad_left
from lkq_hf.evaluation.environment import environment
from lkq_hf.evaluation.prefill import cache_bytes, read_prompts
from lkq_hf.evaluation.tasks.base import Draft
from lkq_hf.evaluation.tasks.needles import FRAME, ONE_VALUE, Needle
from lkq_hf.scoring import SCORERS
from lkq_hf.text.documents import read_documents
from lkq_hf.text.passages import Corpus

ANSWER_TOKENS = 16
PLACEHOLDER = "ANSWER-GOES-HERE"


class Facts(Needle):
    """As many planted facts as there are turns; keeps what was planted."""

    kind = "needle_conversation"

    def draft(self, length: int, rng: random.Random) -> Draft | None:
        draft = super().draft(length, rng)
        if draft is not None:
            # "One special magic number for {key} is: {value}."
            statements = [statement.removesuffix(".") for _, statement in draft.insertions]
            parts = [
                statement.removeprefix("One special magic number for ").split(" is: ") for statement in statements
            ]
            self.facts = [(key, value) for key, value in parts]
        return draft


@dataclass
class Conversation:
    """The ids of the text, those of the first question, and the facts in the order of the questions."""

    text: list[int]
    question: list[int]
    facts: list[tuple[str, str]]


def conversations(corpus: Corpus, count: int, length: int, turns: int) -> list[Conversation]:
    task = Facts(corpus)
    task.keys = turns
    made: list[Conversation] = []
    for index in itertools.count():
        if len(made) == count:
            break
        ids = task.example(index, length)["input_ids"]
        question = first_question(corpus.tokenizer, task.facts[0][0])
        if ids[-len(question) :] == question:  # otherwise a token spans the seam
            made.append(Conversation(ids[: -len(question)], question, task.facts))
    return made


def first_question(tokenizer: Any, key: str) -> list[int]:
    """Token ids from the end of the text to the beginning of the first answer."""
    question, prefix = (text.format(key=key) for text in ONE_VALUE)
    content = FRAME.replace("{document}", PLACEHOLDER).replace("{question}", question)
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split(PLACEHOLDER)[1]
    return tokenizer(text + prefix, add_special_tokens=False)["input_ids"]


def later_turn(tokenizer: Any, key: str) -> list[int]:
    """Token ids from the end of an answer to the beginning of the next one."""
    question, prefix = (text.format(key=key) for text in ONE_VALUE)
    chat = [
        {"role": "user", "content": FRAME},
        {"role": "assistant", "content": PLACEHOLDER},
        {"role": "user", "content": question},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split(PLACEHOLDER)[1]
    return tokenizer(text + prefix, add_special_tokens=False)["input_ids"]


def padded(rows: list[list[int]], tokenizer: Any, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with padding on the left, and their mask, on the device."""
    ids, mask = pad_left(rows, tokenizer.eos_token_id)
    return ids.to(device), mask.to(device)


def read_texts(
    model: Any, tokenizer: Any, batch: list[Conversation], budgets: list[int], scorers: list[str]
) -> dict[str, Cache]:
    """By name, caches that hold the texts."""
    ids, mask = padded([one.text for one in batch], tokenizer, model.device)
    prefill = read_prompts(model, ids, mask, {name: SCORERS[name]() for name in scorers}, budgets)
    caches: dict[str, Cache] = {"full cache": prefill.full}
    for (scorer, budget), cache in prefill.caches.items():
        cache.evict_later_turns = True
        caches[f"{budget}/{scorer}"] = cache
    return caches


@torch.no_grad()
def converse(
    model: Any, tokenizer: Any, batch: list[Conversation], cache: Cache, turns: int, read_first: bool
) -> tuple[list[list[bool]], list[int]]:
    """Whether each conversation's answer is right, turn by turn, and the bytes of the cache."""
    end, place = tokenizer.eos_token_id, (tokenizer, model.device)
    ids, mask = padded([one.text for one in batch], *place)
    right, sizes = [], []
    for turn in range(turns):
        if turn == 0 and not read_first:
            ids, mask = padded([one.text + one.question for one in batch], *place)
        else:
            asked = [later_turn(tokenizer, one.facts[turn][0]) if turn else one.question for one in batch]
            ids, mask = (torch.cat(parts, dim=1) for parts in zip((ids, mask), padded(asked, *place), strict=True))
        output = answer(model, ids, cache, ANSWER_TOKENS, attention_mask=mask, pad_token_id=end)
        answers = output[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right.append([one.facts[turn][1] in text for one, text in zip(batch, texts, strict=True)])
        sizes.append(cache_bytes(cache))
        # What follows the end of an answer is padding.
        answered = ((answers == end).cumsum(1) == 0).long()
        ids, mask = output, torch.cat([mask, answered], dim=1)
    return right, sizes


def methods(budgets: list[int], scorers: list[str], with_parked: bool) -> dict[str, Callable[[Any], Cache]]:
    """By name, what makes an empty cache for a model's config."""
    found: dict[str, Callable[[Any], Cache]] = {"full cache": lambda config: DynamicCache(config=config)}
    for budget in budgets:
        for scorer in scorers:
            for park in (None, "cpu") if with_parked and scorer != "streaming" else (None,):
                name = f"{budget}/{scorer}{', parked' if park else ''}"
                found[name] = lambda config, b=budget, s=scorer, p=park: LookaheadCache(b, s, park=p)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", nargs="+", type=Path, required=True)
    options.add_argument("--adapter")
    options.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    options.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256])
    options.add_argument("--scorers", nargs="+", choices=list(SCORERS), help="by default all that are named above")
    options.add_argument("--conversations", type=int, default=64)
    options.add_argument("--turns", type=int, default=8)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--device", default=DEVICE)
    options.add_argument("--read-first", action="store_true", help="read the text before the first question")
    options.add_argument("--not-parked", action="store_true", help="leave out what is parked")
    options.add_argument("--small", action="store_true")
    arguments = options.parse_args()
    if arguments.small:
        arguments.lengths, arguments.budgets, arguments.conversations, arguments.turns = [512], [64], 2, 3
    started = time.monotonic()
    model, tokenizer = real_model(adapter=arguments.adapter, device=arguments.device)
    corpus = Corpus(read_documents(arguments.texts), tokenizer)
    scorers = arguments.scorers or ["snapkv", "streaming"] + (["lookahead"] if arguments.adapter else [])
    ways = methods(arguments.budgets, scorers, not arguments.not_parked)
    results: dict[str, Any] = {
        "about": environment(model.device),
        "adapter": Path(arguments.adapter).name if arguments.adapter else None,
        "conversations": arguments.conversations,
        "read_first": arguments.read_first,
        "lengths": {},
    }
    for length in arguments.lengths:
        made = conversations(corpus, arguments.conversations, length, arguments.turns)
        rows = results["lengths"][str(length)] = {}
        right: dict[str, list[int]] = defaultdict(lambda: [0] * arguments.turns)
        sizes: dict[str, list[int]] = defaultdict(lambda: [0] * arguments.turns)
        for start in tqdm(range(0, len(made), arguments.batch_size), desc=f"{length} tokens"):
            batch = made[start : start + arguments.batch_size]
            caches: Iterator[tuple[str, Cache]] = ((name, empty(model.config)) for name, empty in ways.items())
            if arguments.read_first:
                caches = iter(read_texts(model, tokenizer, batch, arguments.budgets, scorers).items())
            for name, cache in caches:
                found, of_cache = converse(model, tokenizer, batch, cache, arguments.turns, arguments.read_first)
                right[name] = [total + sum(each) for total, each in zip(right[name], found, strict=True)]
                sizes[name] = [total + each for total, each in zip(sizes[name], of_cache, strict=True)]
                done = start + len(batch)
                rows[name] = {"right": [value / done for value in right[name]], "bytes": sizes[name]}
            results["seconds"] = time.monotonic() - started
            save(arguments.out, results)


if __name__ == "__main__":
    main()
