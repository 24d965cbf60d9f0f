"""What reading a prompt in chunks costs, where nothing is parked: planted facts that are found.

    python benchmarks/chunked_prefill.py --prompts 8 --chunks 256 340 --out benchmarks/results/chunked_prefill

Each prompt hides one fact and ends with the question. It is read at once, in chunks, and in chunks with everything
parked, by SmolLM2-135M-Instruct with the shipped adapter. Without parking each chunk attends to what was kept of those
before, four times the budget. Texts are Python's language reference, unless ``--texts`` names others. Writes OUT.json
and OUT.md.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from real_models import load_smollm2
from tables import table
from tqdm import tqdm

from lkq_hf import LookaheadCache, shipped_adapter
from lkq_hf.evaluation.environment import environment
from lkq_hf.evaluation.tasks.needles import Needle
from lkq_hf.text.documents import read_documents
from lkq_hf.text.passages import Corpus


def answer(
    model: Any, tokenizer: Any, ids: list[int], budget: int, scorer: str, chunk: int | None, park: str | None
) -> tuple[str, torch.Tensor | None]:
    """The text, and which entries were kept, ``[layers, 1, kv_heads, tokens]``; None if all were."""
    cache = LookaheadCache(budget, scorer, park=park)
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        past_key_values=cache,
        prefill_chunk_size=chunk,
        max_new_tokens=Needle.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    kept = torch.stack([layer.kept() for layer in cache.layers]) if cache.has_prefix else None
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), kept


def report(results: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{found[budget]}, {results['same'][name][budget] / results['prompts']:.0%}" for budget in found)]
        for name, found in results["found"].items()
    ]
    header = ["scorer, prompt read", *(f"budget {budget}" for budget in results["budgets"])]
    return (
        "# Chunked prefill\n\n"
        f"One planted fact in {results['length']:,} tokens: how many of {results['prompts']} are found, "
        "and which share of the entries is that which the scorer keeps of a prompt read at once. "
        f"SmolLM2-135M-Instruct, {results['about']['hardware']['name']}. With a budget of {results['length']:,} "
        f"nothing is evicted: {results['full cache']} are found.\n\n{table(header, rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--budgets", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--chunks", nargs="+", type=int, default=[256])
    parser.add_argument("--scorers", nargs="+", default=["lookahead", "snapkv"])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_smollm2()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.load_adapter(str(shipped_adapter()))
    if arguments.texts:
        documents = read_documents(arguments.texts)
    else:
        documents = [{"document": name, "text": text} for name, text in topics.items()]
    prompts = list(Needle(Corpus(documents, tokenizer)).examples(arguments.prompts, arguments.length))
    ways: dict[str, tuple[str, int | None, str | None]] = {}
    for scorer in arguments.scorers:
        ways[f"{scorer}, at once"] = scorer, None, None
        for chunk in arguments.chunks:
            ways[f"{scorer}, in chunks of {chunk}"] = scorer, chunk, None
            ways[f"{scorer}, in chunks of {chunk}, parked"] = scorer, chunk, "cpu"
    found: dict[str, dict[str, int]] = {name: dict.fromkeys(map(str, arguments.budgets), 0) for name in ways}
    same = {name: dict.fromkeys(map(str, arguments.budgets), 0.0) for name in ways}
    results: dict[str, Any] = {
        "about": environment(model.device),
        "length": arguments.length,
        "budgets": arguments.budgets,
        "full cache": 0,
        "found": found,
        "same": same,
    }
    for count, prompt in enumerate(tqdm(prompts), 1):

        def finds(text: str, prompt: Any = prompt) -> bool:
            return all(value in text for value in prompt["reference"])

        ids = prompt["input_ids"]
        results["full cache"] += finds(answer(model, tokenizer, ids, arguments.length, "streaming", None, None)[0])
        whole: dict[Any, Any] = {}
        for name, way in ways.items():
            for budget in arguments.budgets:
                text, kept = answer(model, tokenizer, ids, budget, *way)
                found[name][str(budget)] += finds(text)
                at_once = whole.setdefault((way[0], budget), kept)  # the first way
                if kept is not None:
                    same[name][str(budget)] += float((kept & at_once).sum() / at_once.sum())
        results["prompts"] = count
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
