"""Conversations over one text: a different planted fact is asked for in each of 8 turns.

    python benchmarks/texts.py debian-handbook_*.deb fortunes_*.deb --out test.jsonl.gz
    python benchmarks/conversations.py --texts test.jsonl.gz \
        --adapter model_cards/smollm2-135m-instruct-lookahead --out benchmarks/results/conversations

With ``--read-first`` the text is read, and evicted, before anything is asked. Methods: the full cache; LookaheadKV and
SnapKV, each with entries parked in main memory and without; sinks + recent.
Each reports the share of right answers by turn, and the bytes of its cache on the model's device after each turn.
Writes OUT.json; pages.py writes the table. ``--small`` is a smoke test for a CPU.
"""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, answer, parser, real_model, save
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import Cache

from lkq_hf import LookaheadCache
from lkq_hf.evaluation.environment import environment
from lkq_hf.evaluation.prefill import cache_bytes
from lkq_hf.evaluation.tasks.base import Draft
from lkq_hf.evaluation.tasks.needles import FRAME, ONE_VALUE, Needle
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


@torch.no_grad()
def converse(
    model: Any, tokenizer: Any, batch: list[Conversation], cache: Cache, turns: int, read_first: bool
) -> tuple[list[list[bool]], list[int]]:
    """Whether each conversation's answer is right, turn by turn, and the bytes of the cache."""
    end, pad = tokenizer.eos_token_id, tokenizer.eos_token_id

    def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids with padding on the left, and their mask."""
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
        return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)

    if read_first:
        ids, mask = padded([one.text for one in batch])
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    right, sizes = [], []
    for turn in range(turns):
        if turn == 0 and not read_first:
            ids, mask = padded([one.text + one.question for one in batch])
        else:
            asked = [later_turn(tokenizer, one.facts[turn][0]) if turn else one.question for one in batch]
            ids, mask = (torch.cat(parts, dim=1) for parts in zip((ids, mask), padded(asked), strict=True))
        output = answer(model, ids, cache, ANSWER_TOKENS, attention_mask=mask, pad_token_id=pad)
        answers = output[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right.append([one.facts[turn][1] in text for one, text in zip(batch, texts, strict=True)])
        sizes.append(cache_bytes(cache))
        # What follows the end of an answer is padding.
        answered = ((answers == end).cumsum(1) == 0).long()
        ids, mask = output, torch.cat([mask, answered], dim=1)
    return right, sizes


def methods(budgets: list[int], with_adapter: bool, with_parked: bool) -> dict[str, Callable[[Any], Cache]]:
    """By name, what makes an empty cache for a model's config."""
    found: dict[str, Callable[[Any], Cache]] = {"full cache": lambda config: DynamicCache(config=config)}
    scorers = ["snapkv", "streaming"] + (["lookahead"] if with_adapter else [])
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
    caches = methods(arguments.budgets, bool(arguments.adapter), not arguments.not_parked)
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
        for name, empty in tqdm(caches.items(), desc=f"{length} tokens"):
            right = [0] * arguments.turns
            sizes: list[int] = [0] * arguments.turns
            for start in range(0, len(made), arguments.batch_size):
                batch = made[start : start + arguments.batch_size]
                cache = empty(model.config)
                found, bytes_by_turn = converse(model, tokenizer, batch, cache, arguments.turns, arguments.read_first)
                right = [total + sum(each) for total, each in zip(right, found, strict=True)]
                sizes = [total + each for total, each in zip(sizes, bytes_by_turn, strict=True)]
            rows[name] = {"right": [value / len(made) for value in right], "bytes": sizes}
            results["seconds"] = time.monotonic() - started
            save(arguments.out, results)


if __name__ == "__main__":
    main()
