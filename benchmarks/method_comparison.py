"""Compares cache methods and adapters, ours or yours: each is a JSON file, and one command adds its row.

    python benchmarks/method_comparison.py --texts test.jsonl.gz  # all in benchmarks/methods
    python benchmarks/method_comparison.py benchmarks/methods/mine.json --texts test.jsonl.gz  # one row more

A file holds what `Method` has: a cache, a context manager around the model (as kvpress' presses are), an adapter, or
several of these. Classes and functions are named as ``module:name``; a module may lie beside the file. The argument
``"$model"`` is the model, ``"$config"`` its config.

Every method reads the same prompts with `generate`, and answers greedily: planted facts, and questions whose answers
are compared with the full cache's by words. OUT.json keeps the rows, OUT.md the table. The full cache comes first;
a row of other prompts, or of another model, is refused.
"""

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, answer, describe, parser, real_model, save
from quality import AGREEMENT_TASKS, FACT_TASKS, Prompts, answer_rows
from tables import RESULTS, declared
from tqdm import tqdm

from lkq_hf import shipped_adapter
from lkq_hf.evaluation.environment import digests
from lkq_hf.evaluation.prefill import cache_bytes

METHODS = Path(__file__).parent / "methods"
FULL = "full cache"


@dataclass(frozen=True)
class Method:
    """What a JSON file says.

    Attributes:
        name: of its row.
        cache: makes an empty cache for one prompt.
        arguments: of ``cache``.
        around: makes a context manager of the model; prompts are read and answered inside of it.
        around_arguments: of ``around``.
        adapter: directory or Hub id of an adapter, or "shipped".
        source: where it comes from: a paper, a package and its version.
    """

    name: str
    cache: str = "transformers:DynamicCache"
    arguments: dict[str, Any] = field(default_factory=lambda: {"config": "$config"})
    around: str | None = None
    around_arguments: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    source: str = ""

    @classmethod
    def read(cls, path: Path) -> "Method":
        sys.path.insert(0, str(path.parent.resolve()))  # a loader beside the file
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def empty_cache(self, model: Any) -> Any:
        return call(self.cache, self.arguments, model)

    def surround(self, model: Any) -> AbstractContextManager[Any]:
        if self.around is None:
            return contextlib.nullcontext()
        return call(self.around, self.around_arguments, model)(model)


def call(name: str, arguments: dict[str, Any], model: Any) -> Any:
    """The result of what ``module:name`` names."""
    module, _, attribute = name.partition(":")
    known = {"$model": model, "$config": model.config}
    filled = {key: known.get(value, value) if isinstance(value, str) else value for key, value in arguments.items()}
    return getattr(importlib.import_module(module), attribute)(**filled)


@torch.no_grad()
def answers(method: Method, model: Any, tokenizer: Any, ids: list[int], new_tokens: int) -> tuple[str, int]:
    """The answer to one prompt, and the bytes of the cache after it."""
    inputs = torch.tensor([ids], device=model.device)
    cache = method.empty_cache(model)
    with method.surround(model):
        output = answer(model, inputs, cache, new_tokens, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), cache_bytes(cache)


def tasks(prompts: Prompts, given: Any) -> Iterator[tuple[str, list[Any], int]]:
    """Name, examples and the tokens of an answer."""
    for kind in FACT_TASKS:
        examples, new_tokens = prompts.facts(kind, given.prompts, given.length)
        yield kind, examples, new_tokens
    for kind in AGREEMENT_TASKS:
        yield kind, prompts.open(kind, given.prompts, given.length, shift=1), given.answer_tokens


def measure(method: Method, given: Any, full: dict[str, list[str]]) -> dict[str, Any]:
    """A row: measures, bytes of a cache and seconds of a prompt with its answer, both means."""
    adapter = shipped_adapter() if method.adapter == "shipped" else method.adapter
    model, tokenizer = real_model(given.model, adapter, given.device)
    prompts = Prompts(given.texts, tokenizer, given.source, given.seed)
    row: dict[str, Any] = {"source": method.source}
    kept: dict[str, list[str]] = {}
    sizes, seconds = [], []
    for task, examples, new_tokens in tasks(prompts, given):
        found = []
        for example in tqdm(examples, desc=f"{method.name}, {task}"):
            start = time.perf_counter()
            text, size = answers(method, model, tokenizer, example["input_ids"], new_tokens)
            found.append(text)
            sizes.append(size)
            seconds.append(time.perf_counter() - start)
        kept[task] = found
        texts = {"full": full.get(task, found), "own": found}
        row[task] = answer_rows(texts, [example["reference"] for example in examples])["own"]
    mean = {"bytes": sum(sizes) / len(sizes), "seconds": sum(seconds) / len(seconds)}
    # The others are compared with the full cache's answers, so these are kept.
    return row | mean | {"environment": describe()} | ({"answers": kept} if method.name == FULL else {})


def report(results: dict[str, Any]) -> str:
    sizes = results["settings"]
    return (
        "# Methods side by side\n\n"
        f"Written by `python benchmarks/method_comparison.py`. {sizes['model']}, {sizes['prompts']} prompts of "
        f"{sizes['length']:,} tokens for each task. Planted facts: share found. Other tasks: words shared with the "
        "full cache's answer. How to add a row: CONTRIBUTING.md.\n\n"
        f"{declared('method_comparison', results)}\n"
    )


def main() -> None:
    options = parser(__doc__, RESULTS / "method_comparison")
    options.add_argument("methods", nargs="*", type=Path, help="JSON files (default: all in benchmarks/methods)")
    options.add_argument("--texts", nargs="+", type=Path, required=True, help="documents as written by texts.py")
    options.add_argument("--source", help="of the texts that open questions are about (default: all)")
    options.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a directory")
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--prompts", type=int, default=16, help="of each task")
    options.add_argument("--answer-tokens", type=int, default=32, help="of open questions")
    options.add_argument("--device", default=DEVICE)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    settings = {name: getattr(given, name) for name in ("length", "prompts", "answer_tokens", "source", "seed")}
    settings |= {"model": Path(given.model).name, "texts": list(digests(given.texts).values())}
    path = given.out.with_suffix(".json")
    results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": {}}
    if results["settings"] != settings:
        raise SystemExit(f"{path} holds rows of other prompts ({results['settings']}): pass these, or another --out")
    methods = [Method.read(file) for file in given.methods or sorted(METHODS.glob("*.json"))]
    if FULL not in results["rows"] and all(method.name != FULL for method in methods):
        methods.append(Method.read(METHODS / "full_cache.json"))
    for method in sorted(methods, key=lambda method: method.name != FULL):
        full = results["rows"].get(FULL, {}).get("answers", {})
        results["rows"][method.name] = measure(method, given, {} if method.name == FULL else full)
        save(path, results)
        path.with_suffix(".md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
