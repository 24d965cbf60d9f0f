"""What reading a prompt in chunks costs, where nothing is parked: planted facts that are found.

    python benchmarks/chunked_prefill.py --prompts 8 --chunks 256 340 --out benchmarks/results/chunked_prefill

Each prompt hides one fact and ends with the question. It is read at once, in chunks, and in chunks with everything
parked, by SmolLM2-135M-Instruct with the shipped adapter. Without parking each chunk attends to what was kept of those
before, four times the budget. Texts are Python's language reference, unless ``--texts`` names others.
"""

from pathlib import Path
from typing import Any

import torch
from common import answer, documents_of, parser, real_model, save
from tqdm import tqdm

from lkq_hf import LookaheadCache, shipped_adapter
from lkq_hf.evaluation.environment import environment
from lkq_hf.evaluation.tasks.needles import Needle
from lkq_hf.text.passages import Corpus


def answer_to(
    model: Any, tokenizer: Any, ids: list[int], budget: int, scorer: str, chunk: int | None, park: str | None
) -> tuple[str, torch.Tensor | None]:
    """The text, and which entries were kept, ``[layers, 1, kv_heads, tokens]``; None if all were."""
    cache = LookaheadCache(budget, scorer, park=park)
    inputs = torch.tensor([ids], device=model.device)
    options = {"prefill_chunk_size": chunk, "pad_token_id": tokenizer.eos_token_id}
    output = answer(model, inputs, cache, Needle.max_new_tokens, **options)
    kept = torch.stack([layer.kept() for layer in cache.layers]) if cache.has_prefix else None
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), kept


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", nargs="+", type=Path)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--budgets", nargs="+", type=int, default=[32, 64])
    options.add_argument("--chunks", nargs="+", type=int, default=[256])
    options.add_argument("--scorers", nargs="+", default=["lookahead", "snapkv"])
    options.add_argument("--prompts", type=int, default=12)
    given = options.parse_args()
    model, tokenizer = real_model(adapter=shipped_adapter())
    ways: dict[str, tuple[str, int | None, str | None]] = {}
    for scorer in given.scorers:
        ways[f"{scorer}, at once"] = scorer, None, None
        for chunk in given.chunks:
            ways[f"{scorer}, in chunks of {chunk}"] = scorer, chunk, None
            ways[f"{scorer}, in chunks of {chunk}, parked"] = scorer, chunk, "cpu"
    found: dict[str, dict[str, int]] = {name: dict.fromkeys(map(str, given.budgets), 0) for name in ways}
    same = {name: dict.fromkeys(map(str, given.budgets), 0.0) for name in ways}
    results: dict[str, Any] = {"about": environment(model.device), "length": given.length, "budgets": given.budgets}
    results |= {"full cache": 0, "found": found, "same": same}
    prompts = list(Needle(Corpus(documents_of(given.texts), tokenizer)).examples(given.prompts, given.length))
    for count, prompt in enumerate(tqdm(prompts), 1):
        ids, expected = prompt["input_ids"], prompt["reference"] or []
        text, _ = answer_to(model, tokenizer, ids, given.length, "streaming", None, None)  # keeps all
        results["full cache"] += all(value in text for value in expected)
        whole: dict[Any, Any] = {}
        for name, way in ways.items():
            for budget in given.budgets:
                text, kept = answer_to(model, tokenizer, ids, budget, *way)
                found[name][str(budget)] += all(value in text for value in expected)
                at_once = whole.setdefault((way[0], budget), kept)  # the first way
                if kept is not None:
                    same[name][str(budget)] += float((kept & at_once).sum() / at_once.sum())
        save(given.out, results | {"prompts": count})
    print(f"the full cache finds {results['full cache']} of {len(prompts)}; found: {found}")


if __name__ == "__main__":
    main()
