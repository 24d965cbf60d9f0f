"""What later turns, parking, refreshes and chunks cost: an 8B Llama with random weights on one CUDA GPU.

    python benchmarks/later_turns.py
    python benchmarks/later_turns.py --small --out later_turns.json  # a smoke run on any machine

After a prompt of 32,768 tokens of which 1,024 entries are kept: milliseconds of reading a later turn of 64 tokens, of
a decode step before and after it, and of an eviction between two steps, with entries parked in main memory and
without; beside transformers' own offloaded cache. Then peak memory of a prompt of 131,072 tokens read at once and in
chunks. Times are medians of wall-clock seconds around synchronized calls, after a warm-up.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, LLAMA_8B, SMALL, describe, free_memory, parser, random_models, save, synchronize
from tables import RESULTS
from transformers import DynamicCache

from lkq_hf import LookaheadCache
from lkq_hf.cache.prepare import get_decoder, refresh

TURN = 64


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def forward(model: Any, length: int, cache: Any) -> Any:
    ids = torch.randint(model.config.vocab_size, (1, length), device=DEVICE)
    return model(input_ids=ids, past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def turns(model: Any, cache: Any, prompt: int, repeats: int) -> dict[str, Any]:
    """Times of one conversation."""
    found: dict[str, Any] = {"prompt_ms": timed(lambda: forward(model, prompt, cache))}
    found["step_ms"] = statistics.median(timed(lambda: forward(model, 1, cache)) for _ in range(repeats))
    readings, after = [], []
    for _ in range(4):
        readings.append(timed(lambda: forward(model, TURN, cache)))
        after += [timed(lambda: forward(model, 1, cache)) for _ in range(repeats)]
    found |= {"later_turn_ms": statistics.median(readings[1:]), "step_after_ms": statistics.median(after)}
    if isinstance(cache, LookaheadCache):
        if cache.refresh_every is not None:
            passes = [timed(lambda: refresh(get_decoder(model), cache, None)) for _ in range(5)]
            found["refresh_ms"] = statistics.median(passes[1:])
        found |= {key: cache.summary()[key] for key in ("bytes", "bytes_parked")}
    return found


@torch.no_grad()
def peak(model: Any, prompt: int, chunk: int, cache: LookaheadCache) -> dict[str, Any]:
    """Seconds, and the peak of memory beyond the weights, of one prompt."""
    free_memory()
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(model.config.vocab_size, (1, prompt), device=DEVICE)
    if chunk < prompt:
        cache.begin_turn(length=prompt)

    def read() -> None:
        for part in ids.split(chunk, dim=1):
            model(input_ids=part, past_key_values=cache, logits_to_keep=1)

    seconds = timed(read) / 1e3
    most = (torch.cuda.max_memory_allocated() - before) / 2**30 if DEVICE == "cuda" else None
    return {"prompt": prompt, "chunk": chunk, "seconds": seconds, "peak_gib": most}


def main() -> None:
    options = parser(__doc__, RESULTS / "later_turns.json")
    options.add_argument("--small", action="store_true")
    given = options.parse_args()
    prompt, budget, repeats, long, chunk = (
        (512, 32, 3, 1024, 128) if given.small else (32_768, 1024, 30, 131_072, 8192)
    )
    plain, adapted = random_models(SMALL if given.small else LLAMA_8B)
    results: dict[str, Any] = {"hardware": describe(), "prompt": prompt, "budget": budget, "turn": TURN}
    rows: dict[str, tuple[Any, Callable[[], Any]]] = {
        "lookahead": (adapted, lambda: LookaheadCache(budget, refresh_every=256)),
        "lookahead, parked": (adapted, lambda: LookaheadCache(budget, park="cpu", refresh_every=256)),
        "snapkv, parked": (plain, lambda: LookaheadCache(budget, "snapkv", park="cpu")),
        "dynamic": (plain, lambda: DynamicCache(config=plain.config)),
        "offloaded": (plain, lambda: DynamicCache(config=plain.config, offloading=True)),
    }
    for name, (model, empty) in rows.items():
        if name == "offloaded" and DEVICE == "cpu":
            continue
        turns(model, empty(), min(prompt, 4096), 3)  # warm-up
        gc.collect()
        results[name] = turns(model, empty(), prompt, 5 if name == "offloaded" else repeats)
        free_memory()
        print(name, json.dumps(results[name]), flush=True)
        save(given.out, results)
    results["peaks"] = {
        "whole": peak(adapted, long, long, LookaheadCache(budget)),
        "chunked": peak(adapted, long, chunk, LookaheadCache(budget)),
        "chunked, parked": peak(adapted, long, chunk, LookaheadCache(budget, park="cpu")),
    }
    save(given.out, results)


if __name__ == "__main__":
    main()
