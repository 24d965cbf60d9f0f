"""What later turns, parking, refreshes and chunks cost: an 8B Llama with random weights on one CUDA GPU.

    python benchmarks/later_turns.py --output benchmarks/results/later_turns.json
    python benchmarks/later_turns.py --small          # a smoke run on any machine

After a prompt of 32,768 tokens of which 1,024 entries are kept: milliseconds of reading a later turn of 64 tokens, of
a decode step before and after it, and of an eviction between two steps, with entries parked in main memory and
without; beside transformers' own offloaded cache. Then peak memory of a prompt of 131,072 tokens read at once and in
chunks. Times are medians of wall-clock seconds around synchronized calls, after a warm-up.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_speed import DEVICE, LLAMA_8B, SMALL, build_models, free_memory, synchronize
from hardware import describe
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
    steps = [timed(lambda: forward(model, 1, cache)) for _ in range(repeats)]
    found["step_ms"] = statistics.median(steps)
    readings, after = [], []
    for _ in range(4):
        readings.append(timed(lambda: forward(model, TURN, cache)))
        after += [timed(lambda: forward(model, 1, cache)) for _ in range(repeats)]
    found["later_turn_ms"] = statistics.median(readings[1:])
    found["step_after_ms"] = statistics.median(after)
    if isinstance(cache, LookaheadCache) and cache.refresh_every is not None:
        passes = [timed(lambda: refresh(get_decoder(model), cache, None)) for _ in range(5)]
        found["refresh_ms"] = statistics.median(passes[1:])
    if isinstance(cache, LookaheadCache):
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

    milliseconds = timed(read)
    most = torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else None
    return {"prompt": prompt, "chunk": chunk, "seconds": milliseconds / 1e3, "peak_gib": most and most / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "later_turns.json")
    options = parser.parse_args()
    prompt, budget, repeats, long, chunk = 32_768, 1024, 30, 131_072, 8192
    if options.small:
        prompt, budget, repeats, long, chunk = 512, 32, 3, 1024, 128
    plain, adapted = build_models(SMALL if options.small else LLAMA_8B)
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
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    results["peaks"] = {
        "whole": peak(adapted, long, long, LookaheadCache(budget)),
        "chunked": peak(adapted, long, chunk, LookaheadCache(budget)),
        "chunked, parked": peak(adapted, long, chunk, LookaheadCache(budget, park="cpu")),
    }
    print(json.dumps(results["peaks"]), flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
