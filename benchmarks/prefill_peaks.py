"""Peak memory of a long prompt by how it is read: an 8B Llama with random weights on one CUDA GPU.

    python benchmarks/prefill_peaks.py
    python benchmarks/prefill_peaks.py --small       # a smoke run on any machine

A prompt of 131,072 tokens, of which 1,024 entries a head are kept, is read at once (heads share the budget, or each
keeps the same), in chunks of 8,192, and both ways with everything parked in main memory. Of each: seconds, the peak of
what is allocated beyond the weights (activations and cache), the peak of what the allocator holds for it, and what
stays allocated (the cache). Less than two minutes on an H200.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, LLAMA_8B, SMALL, describe, free_memory, measure_all, parser, random_models, synchronize
from tables import RESULTS

from lkq_hf import LookaheadCache


@torch.no_grad()
def read(model: Any, length: int, chunk: int, cache: LookaheadCache) -> dict[str, Any]:
    """Reads one prompt of random tokens."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=DEVICE)
    free_memory()
    if DEVICE == "cuda":
        before, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start = time.perf_counter()
    cache.begin_turn(length=length)
    for part in ids.split(chunk, dim=1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    synchronize()
    found = {"seconds": time.perf_counter() - start, "bytes": cache.nbytes, "bytes_parked": cache.parked_nbytes}
    if DEVICE == "cuda":
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        found["peak_held_gib"] = (torch.cuda.max_memory_reserved() - held) / 2**30
        found["gib_after"] = (torch.cuda.memory_allocated() - before) / 2**30
    return found


def main() -> None:
    arguments = parser(__doc__, RESULTS / "prefill_peaks.json")
    arguments.add_argument("--small", action="store_true")
    options = arguments.parse_args()
    length, budget, chunk = (1024, 32, 128) if options.small else (131_072, 1024, 8192)
    _, model = random_models(SMALL if options.small else LLAMA_8B)
    ways: dict[str, tuple[int, Callable[[], LookaheadCache]]] = {
        "at once": (length, lambda: LookaheadCache(budget)),
        "at once, uniform": (length, lambda: LookaheadCache(budget, allocation="uniform")),
        "at once, parked": (length, lambda: LookaheadCache(budget, park="cpu")),
        "in chunks": (chunk, lambda: LookaheadCache(budget)),
        "in chunks, parked": (chunk, lambda: LookaheadCache(budget, park="cpu")),
    }
    rows: dict[str, Any] = {}
    results = {"hardware": describe(), "length": length, "budget": budget, "chunk": chunk, "rows": rows}
    read(model, 4 * chunk, chunk, LookaheadCache(budget))  # warm-up
    cells = {name: lambda way=way: read(model, length, way[0], way[1]()) for name, way in ways.items()}
    measure_all(cells, rows, options.out, results)


if __name__ == "__main__":
    main()
