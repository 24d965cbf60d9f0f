"""Ask a small model about a long document, with its cache cut to a few entries: what is kept, what is lost.

    python examples/quickstart.py

A part of Python's language reference (it comes with every Python) hides a few facts. The same questions are answered
with the full cache and with three ways to keep only `--budget` entries of it, on the real SmolLM2-135M-Instruct.
"""

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from real_models import load_smollm2
from transformers import DynamicCache, LogitsProcessor

from lkq_hf import LookaheadCache
from lkq_hf.compat import pass_cache

ADAPTER = Path(__file__).parents[1] / "model_cards" / "smollm2-135m-instruct-lookahead"

# What is hidden, where (as a share of the document), what is asked, and what counts as the answer.
FACTS = [
    ("Please note that the meeting room on the third floor has the door code 58203.", 0.22,
     "What is the door code of the meeting room on the third floor?", "58203"),
    ("By the way, the invoice for the new printer carries the number 9140367.", 0.47,
     "What number does the invoice for the new printer carry?", "9140367"),
    ("Remember that the night train to Lisbon leaves from platform 614725.", 0.71,
     "From which platform does the night train to Lisbon leave?", "614725"),
]  # fmt: skip


def build_document(tokenizer, length: int) -> str:
    """About `length` tokens of the language reference, with the facts in it."""
    text = "\n\n".join(topics[name].strip() for name in ("compound", "exprlists", "operator-summary", "typesmapping"))
    ends = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    text = text[: ends[min(length, len(ends)) - 1][1]]
    for fact, share, _, _ in reversed(FACTS):
        place = text.find("\n\n", int(share * len(text)))
        text = f"{text[:place]}\n\n{fact}{text[place:]}"
    return text


class FirstTokenClock(LogitsProcessor):
    """Notes when the first token's logits are there."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.seconds is None:
            self.seconds = time.perf_counter() - self.started
        return scores


def ask(model, tokenizer, document: str, question: str, cache) -> tuple[str, float]:
    """The model's answer, and the seconds until its first token."""
    messages = [{"role": "user", "content": f"{document}\n\n{question} Answer with the number only."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    clock = FirstTokenClock()
    output = model.generate(
        **inputs, **pass_cache(cache), max_new_tokens=20, do_sample=False, logits_processor=[clock]
    )
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(new_tokens, skip_special_tokens=True).split()), clock.seconds


def bytes_held(cache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=128, help="entries kept per layer and KV head")
    parser.add_argument("--length", type=int, default=2000, help="tokens of the document")
    parser.add_argument("--questions", type=int, default=len(FACTS), help="how many of the questions to ask")
    arguments = parser.parse_args()

    model, tokenizer = load_smollm2()
    model.load_adapter(str(ADAPTER))
    caches = {
        "full cache": lambda: DynamicCache(config=model.config),
        "LookaheadCache": lambda: LookaheadCache(budget=arguments.budget),
        "SnapKV": lambda: LookaheadCache(budget=arguments.budget, scorer="snapkv"),
        "sinks + recent": lambda: LookaheadCache(budget=arguments.budget, scorer="streaming"),
    }
    document = build_document(tokenizer, arguments.length)
    tokens = len(tokenizer(document, verbose=False)["input_ids"])
    print(f"SmolLM2-135M-Instruct reads {tokens:,} tokens and keeps {arguments.budget} entries per layer and head.\n")

    rows = []
    questions = FACTS[: arguments.questions]
    for _, _, question, expected in questions:
        print(f"{question}  (in the text: {expected})")
        for name, new_cache in caches.items():
            cache = new_cache()
            reply, seconds = ask(model, tokenizer, document, question, cache)
            right = expected in reply
            rows.append((name, right, seconds, bytes_held(cache)))
            print(f"  {name:16s} {'right' if right else 'wrong'}   {reply}", flush=True)
        print()

    print(f"{'':16s} {'right':>7s} {'KV cache':>12s} {'first token':>13s}")
    totals = {}
    for name in caches:
        mine = [row for row in rows if row[0] == name]
        right, size = sum(row[1] for row in mine), max(row[3] for row in mine)
        seconds = sorted(row[2] for row in mine)[len(mine) // 2]
        totals[name] = (right, size)
        print(f"{name:16s} {f'{right} of {len(mine)}':>7s} {size / 2**20:>8.1f} MiB {seconds:>11.1f} s")
    (full_right, full_size), (right, size) = totals["full cache"], totals["LookaheadCache"]
    print(
        f"\nLookaheadCache answered {right} of {len(questions)} questions (the full cache {full_right}) "
        f"with {size / full_size:.1%} of the full cache's memory."
    )


if __name__ == "__main__":
    main()
