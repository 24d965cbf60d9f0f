"""Do answers gain when the values of the kept entries are refitted? An experiment, on one prompt at a time.

    python benchmarks/value_refit.py --texts test.jsonl.gz --out benchmarks/results/value_refit.json

After an eviction the values V of a KV head's kept entries are replaced by the V' that minimize

    |A V' - O|^2 + damping * d * |V' - V|^2,

where the rows of A are the lookahead tokens' attention over the kept entries alone (softmax over them), O is what the
same rows get from all entries of the prompt, and d is the mean of the diagonal of A A^T. In closed form
V' = V + A^T (A A^T + damping * d)^-1 (O - A V). The system is as large as the number of rows: the lookahead tokens
times the query heads of a KV head. The cache takes no more memory for it.

Two measures at each budget: NLL of the full cache's own answer (explain, summarize, continue), and planted facts that
generated answers state.

It did not help SmolLM2 with the shipped adapter (results/value_refit.json): the lookahead tokens' outputs come closer
to those over all entries, and answers lose a little more than without it. So it is no option of the cache.
"""

import argparse
import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from real_models import load_smollm2
from transformers import PreTrainedModel

from lkq_hf import LookaheadCache, shipped_adapter
from lkq_hf.cache.prefix import Pool
from lkq_hf.evaluation.decoding import Answers, answer_greedily, score_answers
from lkq_hf.evaluation.prefill import read_prompts, stack_caches
from lkq_hf.evaluation.tasks import build_task
from lkq_hf.hub import load_adapter
from lkq_hf.scoring import LookaheadScorer, PrefillAttention
from lkq_hf.text.documents import read_documents
from lkq_hf.text.passages import Corpus

READING = ("explain", "summarise", "continue")
FACTS = ("needle", "needle_multi_key")


@dataclass(frozen=True)
class RecordingScorer(LookaheadScorer):
    """Remembers, for each layer, what the lookahead tokens get from the whole prompt."""

    seen: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = field(default_factory=dict)
    """By layer: queries and outputs ``[batch, kv_heads, rows, features]``, and the scaling of the logits."""

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        heads, length = attention.key.shape[1], attention.length
        rows = attention.query[:, :, -attention.suffix_length :].unflatten(1, (heads, -1)).flatten(2, 3)
        logits = rows @ attention.key[:, :, :length].transpose(-1, -2) * attention.scaling
        outputs = logits.softmax(-1) @ attention.value[:, :, :length]
        self.seen[attention.layer_index] = rows, outputs, attention.scaling
        return super().score(attention)


def refit(keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, outputs: torch.Tensor, scaling: float,
          damping: float) -> torch.Tensor:  # fmt: skip
    """The values of one head.

    Args:
        keys, values: of the kept entries, ``[kept, features]``.
        rows: queries, ``[rows, head_dim]``.
        outputs: what they get from all entries, ``[rows, value_dim]``.
        scaling: of the logits.
        damping: see above.
    """
    attention = (rows @ keys.T * scaling).softmax(-1).double()
    products = attention @ attention.T
    products.diagonal().add_(damping * products.diagonal().mean())
    missing = outputs.double() - attention @ values.double()
    return values + (attention.T @ torch.linalg.solve(products, missing)).to(values)


def refitted(cache: LookaheadCache, seen: dict[int, Any], damping: float) -> LookaheadCache:
    """A copy of the cache with other values."""
    copied = copy.deepcopy(cache)
    pools: dict[int, Pool] = {}
    for index in copied.evicted_layers():
        prefix = copied.layers[index].prefix
        pool = pools.setdefault(id(prefix.pool), replace(prefix.pool, values=prefix.pool.values.clone()))
        rows, outputs, scaling = seen[index]
        for head, (start, length) in enumerate(
            zip(prefix.starts[0].tolist(), prefix.lengths[0].tolist(), strict=True)
        ):
            kept = slice(start, start + length)
            pool.values[kept] = refit(
                pool.keys[kept], prefix.pool.values[kept], rows[0, head], outputs[0, head], scaling, damping
            )
        copied.layers[index].prefix = replace(prefix, pool=pool)
    return copied


def variants(
    model: PreTrainedModel, ids: torch.Tensor, budgets: Sequence[int], dampings: Sequence[float]
) -> tuple[Any, dict[tuple[int, str], LookaheadCache]]:
    scorer = RecordingScorer()
    prefill = read_prompts(model, ids, torch.ones_like(ids), {"lookahead": scorer}, budgets)
    caches = {}
    for (_, budget), cache in prefill.caches.items():
        caches[budget, "as it is"] = cache
        for damping in dampings:
            caches[budget, f"damping {damping:g}"] = refitted(cache, scorer.seen, damping)
    return prefill, caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapter", default=None)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=8, help="prompts of each task")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer that is scored")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.1, 1.0, 10.0])
    options = parser.parse_args()
    model, tokenizer = load_smollm2()
    load_adapter(model, options.adapter or shipped_adapter())
    corpus = Corpus(read_documents([options.texts]), tokenizer)
    nll: dict[Any, list[float]] = defaultdict(list)
    found: dict[Any, list[bool]] = defaultdict(list)
    started = time.monotonic()
    for number in range(options.count):
        for name in (*READING, *FACTS):
            task = build_task(name, corpus)
            example = task.example(number, options.length)
            ids = torch.tensor([example["input_ids"]])
            mask = torch.ones_like(ids)
            prefill, caches = variants(model, ids, options.budgets, options.dampings)
            full = copy.deepcopy(prefill.full)
            new_tokens = options.answer if name in READING else task.max_new_tokens
            answer = answer_greedily(model, prefill.logits, mask, full, new_tokens)
            if name in READING:
                scored, _ = score_answers(model, prefill.logits, mask, prefill.full, answer)
                nll["full cache"].append(float(scored[answer.mask].mean()))
            else:
                found["full cache"].append(holds(tokenizer.decode(answer.tokens()[0]), example["reference"]))
            for budget in options.budgets:
                names = [variant for other, variant in caches if other == budget]
                together = stack_caches([caches[budget, variant] for variant in names])
                count = len(names)
                logits, masks = prefill.logits.repeat(count, 1), mask.repeat(count, 1)
                if name in READING:
                    given = Answers(answer.ids.repeat(count, 1), answer.mask.repeat(count, 1))
                    scored, _ = score_answers(model, logits, masks, together, given)
                    for variant, row in zip(names, scored, strict=True):
                        nll[budget, variant].append(float(row[answer.mask[0]].mean()))
                else:
                    own = answer_greedily(model, logits, masks, together, new_tokens)
                    for variant, tokens in zip(names, own.tokens(), strict=True):
                        found[budget, variant].append(holds(tokenizer.decode(tokens), example["reference"]))
        write(options, nll, found, time.monotonic() - started)


def holds(answer: str, reference: list[str] | None) -> bool:
    return all(part in answer for part in reference or [])


def write(
    options: argparse.Namespace, nll: dict[Any, list[float]], found: dict[Any, list[bool]], seconds: float
) -> None:
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("texts", "out", "adapter")}
    rows = []
    for cell, values in nll.items():
        budget, variant = cell if isinstance(cell, tuple) else (None, cell)
        row = {"budget": budget, "variant": variant, "prompts": len(values), "nll": sum(values) / len(values)}
        if budget is not None:
            # Of the difference from the cache as it is, prompt by prompt.
            gains = torch.tensor(nll[budget, "as it is"]) - torch.tensor(values)
            row["gain"] = float(gains.mean())
            row["standard error"] = float(gains.std()) / math.sqrt(len(values)) if len(values) > 1 else None
        facts = found[cell]
        rows.append({**row, "facts": len(facts), "found": sum(facts)})
    content = {"environment": describe(), "settings": settings, "seconds": round(seconds), "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
