"""What evictions during a long answer cost in nats: refreshed caches at equal memory against the full one.

    python benchmarks/long_answers.py --out benchmarks/results/long_answers
    python benchmarks/long_answers.py --small --out /tmp/long_answers        # a smoke run for a CPU

SmolLM2-135M-Instruct with the shipped adapter reads the beginning of a text, and then the rest as if it generated it
(teacher forcing), ``refresh_every`` tokens at a time. The rest is the text's own, or what the model samples with the
full cache, for which no cache can do better than the full one. Each scorer keeps the same number of entries: a budget,
and at most twice ``refresh_every`` recent tokens. "streaming" is sinks and recent tokens. Texts are Python's language
reference, unless ``--texts`` names others. Writes OUT.json and OUT.md.
"""

import argparse
import json
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from real_models import load_smollm2
from tables import table
from torch.nn import functional as F
from transformers import DynamicCache

from lkq_hf import LookaheadCache, shipped_adapter
from lkq_hf.evaluation.environment import environment
from lkq_hf.text.documents import read_documents

SCORERS = ("lookahead", "snapkv", "streaming")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def windows(tokenizer: Any, texts: list[Path] | None, count: int, length: int) -> torch.Tensor:
    """``[count, length]`` ids, evenly spread over all texts."""
    documents = [row["text"] for row in read_documents(texts)] if texts else list(topics.values())
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


def report(results: dict[str, Any]) -> str:
    sizes = "{prompt:,} tokens are read, {answer:,} follow; {texts} texts; `refresh_every={every}`".format(**results)
    parts = [
        "# Long answers\n\nNats a token lost against the full cache under teacher forcing, and the KL divergence from "
        f"it. SmolLM2-135M-Instruct, {results['about']['hardware']['name']}, {results['seconds']:.0f} s. {sizes}. "
        "The most entries of a head include recent tokens."
    ]
    for kind, rows in results["rows"].items():
        cells = [
            [
                name,
                f"{row['entries']:.0f}",
                f"{row['nats']:.3f}",
                f"{row['nats_by_quarter'][-1]:.3f}",
                f"{row['kl']:.3f}",
            ]
            for name, row in rows.items()
        ]
        parts.append(f"## {kind}\n\n" + table(["cache", "most entries", "nats", "last quarter", "KL"], cells))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--answer", type=int, default=2048)
    parser.add_argument("--refresh-every", type=int, default=64)
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        options.count, options.prompt, options.answer, options.refresh_every, options.budgets = 2, 192, 192, 32, [64]
    started = time.monotonic()
    torch.manual_seed(0)
    model, tokenizer = load_smollm2(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    model.to(DEVICE).load_adapter(shipped_adapter())  # type: ignore[arg-type]
    ids = windows(tokenizer, options.texts, options.count, options.prompt + options.answer).to(DEVICE)
    prompt, every = options.prompt, options.refresh_every
    sampled: Any = model.generate(  # type: ignore[operator]
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
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
