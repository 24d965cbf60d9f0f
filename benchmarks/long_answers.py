"""What evictions during a long answer cost in nats: refreshed caches at equal memory against the full one.

    python benchmarks/long_answers.py --out benchmarks/results/long_answers
    python benchmarks/long_answers.py --small --out /tmp/long_answers        # a smoke run for a CPU

SmolLM2-135M-Instruct with the shipped adapter reads the beginning of a text, and then the rest as if it generated it
(teacher forcing), ``refresh_every`` tokens at a time. The rest is the text's own, or what the model samples with the
full cache, for which no cache can do better than the full one. Each scorer keeps the same number of entries: a budget,
and at most twice ``refresh_every`` recent tokens. "streaming" is sinks and recent tokens. Texts are Python's language
reference, unless ``--texts`` names others.
"""

import time
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, documents_of, parser, real_model, save
from tables import declared
from torch.nn import functional as F
from transformers import DynamicCache

from lkq_hf import LookaheadCache, shipped_adapter
from lkq_hf.evaluation.environment import environment

SCORERS = ("lookahead", "snapkv", "streaming")


def windows(tokenizer: Any, texts: list[Path] | None, count: int, length: int) -> torch.Tensor:
    """``[count, length]`` ids, evenly spread over all texts."""
    documents = [row["text"] for row in documents_of(texts)]
    ids = torch.tensor(tokenizer("\n\n".join(documents), verbose=False)["input_ids"])
    if len(ids) < count * length:
        raise SystemExit(f"the texts have {len(ids):,} tokens; {count} x {length:,} are asked for")
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.stack([ids[start : start + length] for start in starts])


@torch.no_grad()
def lost(model: Any, ids: torch.Tensor, prompt: int, caches: dict[str, Any], every: int) -> dict[str, dict[str, Any]]:
    """Of each cache nats per token of the rest beyond the full one's, and the divergence from it, in quarters."""
    full = DynamicCache(config=model.config)
    rows: dict[str, Any] = {name: {"nats": [], "kl": [], "entries": 0.0} for name in caches}
    for start, end in [
        (0, prompt),
        *((at, min(at + every, ids.shape[1])) for at in range(prompt, ids.shape[1], every)),
    ]:
        part, following = ids[:, start:end], ids[:, start + 1 : end + 1]
        keep = 1 if start == 0 else end - start
        expected = _log_probabilities(model, part, full, keep)
        expected, following = expected[:, : following.shape[1]], following[:, -keep:]
        for name, cache in caches.items():
            found = _log_probabilities(model, part, cache, keep)[:, : following.shape[1]]
            difference = expected - found
            rows[name]["nats"].append(difference.gather(-1, following[..., None])[..., 0].mean(0).cpu())
            rows[name]["kl"].append((expected.exp() * difference).sum(-1).mean(0).cpu())
            rows[name]["entries"] = max(rows[name]["entries"], cache.summary()["entries_stored"])
    for row in rows.values():
        for kind in ("nats", "kl"):
            tokens = torch.cat(row[kind])
            row[kind], row[f"{kind}_by_quarter"] = float(tokens.mean()), [float(q.mean()) for q in tokens.chunk(4)]
    return rows


def _log_probabilities(model: Any, ids: torch.Tensor, cache: Any, keep: int) -> torch.Tensor:
    return F.log_softmax(model(input_ids=ids, past_key_values=cache, logits_to_keep=keep).logits.float(), dim=-1)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--texts", nargs="+", type=Path)
    arguments.add_argument("--count", type=int, default=32)
    arguments.add_argument("--prompt", type=int, default=1024)
    arguments.add_argument("--answer", type=int, default=2048)
    arguments.add_argument("--refresh-every", type=int, default=64)
    arguments.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256])
    arguments.add_argument("--small", action="store_true")
    options = arguments.parse_args()
    if options.small:
        options.count, options.prompt, options.answer, options.refresh_every, options.budgets = 2, 192, 192, 32, [64]
    started = time.monotonic()
    torch.manual_seed(0)
    model, tokenizer = real_model(adapter=shipped_adapter())
    ids = windows(tokenizer, options.texts, options.count, options.prompt + options.answer).to(DEVICE)
    prompt, every = options.prompt, options.refresh_every
    sampled = model.generate(
        ids[:, :prompt],
        attention_mask=torch.ones_like(ids[:, :prompt]),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=options.answer,
        max_new_tokens=options.answer,
        pad_token_id=tokenizer.eos_token_id,
    )
    results: dict[str, Any] = {"about": environment(model.device), "rows": {}}
    results |= {"texts": options.count, "prompt": prompt, "answer": options.answer, "every": every}
    for kind, text in (("The text's own continuation", ids), ("The full cache's own continuation, sampled", sampled)):
        caches = {
            f"{budget}/{scorer}": LookaheadCache(budget, scorer, evict_later_turns=False, refresh_every=every)
            for budget in options.budgets
            for scorer in SCORERS
        }
        results["rows"][kind] = lost(model, text, prompt, caches, every)
        results["seconds"] = time.monotonic() - started
        save(options.out, results)
        print(kind, declared("long_answer", {"rows": results["rows"][kind]}), sep="\n\n")


if __name__ == "__main__":
    main()
