"""Whether to read the last answer again with the next turn, where entries are parked: divergence and seconds.

    python benchmarks/rereading.py --out benchmarks/results/rereading

An answer's own entries are computed over evicted ones. Reading its tokens again with the next turn, over the whole
text, makes the history exact: ``cache.crop`` to the end of the turn before. The full cache of SmolLM2-135M-Instruct
answers questions about planted facts; other caches are given its answers (teacher forcing). Reported by turn: the KL
divergence of their next tokens from the full cache's, in nats a token, and seconds of reading the turn.
"""

import time
from pydoc_data.topics import topics
from typing import Any

import torch
from common import parser, save
from conversations import conversations, later_turn
from real_models import load_smollm2
from tables import table
from torch.nn import functional as F
from transformers import DynamicCache

from lkq_hf import LookaheadCache, shipped_adapter
from lkq_hf.evaluation.environment import environment
from lkq_hf.text.passages import Corpus


def forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Log-probabilities after the last token, ``[1, vocabulary]``."""
    return F.log_softmax(model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].float(), -1)


@torch.no_grad()
def converse(model: Any, turns: list[torch.Tensor], answers: list[torch.Tensor], cache: Any, again: bool) -> Any:
    """Log-probabilities ``[tokens, vocabulary]`` of each answer, and seconds of reading each turn."""
    found, seconds = [], []
    for turn, (ids, answer) in enumerate(zip(turns, answers, strict=True)):
        start = time.perf_counter()
        if again and turn:
            before = answers[turn - 1][:, :-1]
            cache.crop(-before.shape[1])
            ids = torch.cat([before, ids], dim=1)
        rows = [forward(model, ids, cache)]
        seconds.append(time.perf_counter() - start)
        rows += [forward(model, token, cache) for token in answer[:, :-1].split(1, dim=1)]
        found.append(torch.cat(rows))
    return found, seconds


@torch.no_grad()
def answers_of(model: Any, turns: list[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """What the full cache answers, ``[1, tokens]`` each; the last token of one is read with the next turn."""
    cache, found = DynamicCache(config=model.config), []
    for turn, ids in enumerate(turns):
        ids = torch.cat([found[-1][:, -1:], ids], dim=1) if turn else ids
        answer = [forward(model, ids, cache).argmax(-1, keepdim=True)]
        while len(answer) < tokens:
            answer.append(forward(model, answer[-1], cache).argmax(-1, keepdim=True))
        found.append(torch.cat(answer, dim=1))
    return found


def report(results: dict[str, Any]) -> str:
    rows = []
    for name, cell in results["rows"].items():
        rows.append([name, *(f"{sum(each) / len(each):.4f}" for each in zip(*cell["kl"], strict=True))])
        rows.append(["seconds", *(f"{sum(each) / len(each):.2f}" for each in zip(*cell["seconds"], strict=True))])
    header = ["cache", *(f"turn {turn + 1}" for turn in range(results["turns"]))]
    about = (
        f"{results['conversations']} conversations over {results['length']:,} tokens, budget {results['budget']}, "
        f"answers of {results['tokens']} tokens; SmolLM2-135M-Instruct, {results['about']['hardware']['name']}. KL "
        "from the full cache in nats a token, under teacher forcing."
    )
    return f"# Reading the last answer again\n\n{about}\n\n{table(header, rows)}\n"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--conversations", type=int, default=6)
    arguments.add_argument("--turns", type=int, default=5)
    arguments.add_argument("--length", type=int, default=1024)
    arguments.add_argument("--budget", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=48)
    options = arguments.parse_args()
    model, tokenizer = load_smollm2()
    model.to("cuda" if torch.cuda.is_available() else "cpu").load_adapter(shipped_adapter())  # type: ignore[arg-type]
    corpus = Corpus([{"document": name, "text": text} for name, text in topics.items()], tokenizer)
    rows: dict[str, Any] = {name: {"kl": [], "seconds": []} for name in ("parked", "parked, answers read again")}
    results: dict[str, Any] = {"about": environment(model.device), **vars(options), "rows": rows}
    del results["out"]
    for count, talk in enumerate(conversations(corpus, options.conversations, options.length, options.turns)):
        texts = [talk.text + talk.question, *(later_turn(tokenizer, key) for key, _ in talk.facts[1:])]
        turns = [torch.tensor([ids], device=model.device) for ids in texts]
        answers = answers_of(model, turns, options.tokens)
        turns = [turns[0], *(torch.cat([a[:, -1:], t], 1) for a, t in zip(answers, turns[1:], strict=False))]
        expected, _ = converse(model, turns, answers, DynamicCache(config=model.config), False)
        for again, (_, row) in enumerate(rows.items()):
            cache = LookaheadCache(options.budget, park="cpu")
            found, seconds = converse(model, turns, answers, cache, bool(again))
            kl = [float((e.exp() * (e - f)).sum(-1).mean()) for e, f in zip(expected, found, strict=True)]
            row["kl"].append(kl)
            row["seconds"].append(seconds)
        results["conversations"] = count + 1
        save(options.out, results)
        options.out.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
