"""What reading a prompt in chunks costs, where nothing is parked: planted facts that are found.

    python benchmarks/chunked_prefill.py --prompts 8 --out benchmarks/results/chunked_prefill

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
from tables import table
from tqdm import tqdm

from lkq_hf import LookaheadCache, shipped_adapter
from lkq_hf.evaluation.environment import environment
from lkq_hf.evaluation.models import load_smollm2
from lkq_hf.evaluation.tasks.needles import Needle
from lkq_hf.text.documents import read_documents
from lkq_hf.text.passages import Corpus


def answer(model: Any, tokenizer: Any, ids: list[int], budget: int, chunk: int | None, park: str | None) -> str:
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        past_key_values=LookaheadCache(budget, park=park),
        prefill_chunk_size=chunk,
        max_new_tokens=Needle.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def report(results: dict[str, Any]) -> str:
    rows = [[name, *map(str, found.values())] for name, found in results["found"].items()]
    header = ["prompt read", *(f"budget {budget}" for budget in results["budgets"])]
    return (
        "# Chunked prefill\n\n"
        f"One planted fact in {results['length']:,} tokens: how many of {results['prompts']} are found. "
        f"SmolLM2-135M-Instruct, {results['about']['hardware']['name']}. With a budget of {results['length']:,} "
        f"nothing is evicted: {results['full cache']} are found.\n\n{table(header, rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--budgets", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--chunks", nargs="+", type=int, default=[256])
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
    ways: dict[str, tuple[int | None, str | None]] = {"at once": (None, None)}
    for chunk in arguments.chunks:
        ways[f"in chunks of {chunk}"] = chunk, None
        ways[f"in chunks of {chunk}, parked"] = chunk, "cpu"
    found: dict[str, dict[str, int]] = {name: dict.fromkeys(map(str, arguments.budgets), 0) for name in ways}
    results: dict[str, Any] = {
        "about": environment(model.device),
        "length": arguments.length,
        "budgets": arguments.budgets,
        "full cache": 0,
        "found": found,
    }
    for count, prompt in enumerate(tqdm(prompts), 1):

        def finds(budget: int, chunk: int | None, park: str | None, prompt: Any = prompt) -> bool:
            text = answer(model, tokenizer, prompt["input_ids"], budget, chunk, park)
            return all(value in text for value in prompt["reference"])

        results["full cache"] += finds(arguments.length, None, None)
        for name, way in ways.items():
            for budget in arguments.budgets:
                found[name][str(budget)] += finds(budget, *way)
        results["prompts"] = count
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
