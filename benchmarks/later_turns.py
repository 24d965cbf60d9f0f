"""What later turns and parking cost: an 8B Llama with random weights on one CUDA GPU.

    python benchmarks/later_turns.py
    python benchmarks/later_turns.py --small         # a smoke run on any machine
    python benchmarks/later_turns.py --hybrid --out hybrid.json     # Qwen3.5 of 9B: a quarter of full attention

A prompt of 32,768 tokens, of which 1,024 entries a head are kept, then later turns of 64 tokens with short answers,
all through ``generate``: milliseconds until a turn's first token, and of a decode step before and after the later
turns. With entries parked in main memory and without, growing and static (compiled), beside transformers' own caches.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, SIZES, answer, describe, measure_all, parser, random_models, synchronize
from decode_speed import StepClock
from tables import RESULTS
from transformers import DynamicCache
from transformers.cache_utils import Cache

from lkq_hf import LookaheadCache

TURN = 64
TURNS = 4
TOKENS_TO_WARM_UP = 2  # of each answer; not timed


def converse(model: Any, cache: Cache, prompt: int, tokens: int) -> dict[str, Any]:
    """Times of one conversation; the median of its later turns but the first, which warms up."""
    text = torch.empty(1, 0, dtype=torch.long, device=DEVICE)
    reading, steps = [], []
    for turn in range(TURNS + 1):
        new = torch.randint(model.config.vocab_size, (1, TURN if turn else prompt), device=DEVICE)
        text, clock = torch.cat([text, new], dim=1), StepClock()
        synchronize()
        start = time.perf_counter()
        text = answer(model, text, cache, tokens, streamer=clock)
        reading.append(1e3 * (clock.marks[0] - start))
        steps.append(clock.milliseconds()[TOKENS_TO_WARM_UP:])
    found = {
        "prompt_ms": reading[0],
        "later_turn_ms": statistics.median(reading[2:]),
        "step_ms": statistics.median(steps[0]),
        "step_after_ms": statistics.median(step for turn in steps[2:] for step in turn),
    }
    if isinstance(cache, LookaheadCache):
        found |= {"bytes": cache.nbytes, "bytes_parked": cache.parked_nbytes}
    return found


def main() -> None:
    arguments = parser(__doc__, RESULTS / "later_turns.json")
    arguments.add_argument("--small", action="store_true")
    arguments.add_argument("--hybrid", action="store_true", help="a model with recurrent layers")
    options = arguments.parse_args()
    prompt, budget, tokens = (512, 32, 8) if options.small else (32_768, 1024, 24)
    plain, adapted = random_models(SIZES["hybrid" if options.hybrid else "llama"][options.small])
    rows: dict[str, tuple[Any, Callable[[], Cache]]] = {
        "dynamic": (plain, lambda: DynamicCache(config=plain.config)),
        "lookahead": (adapted, lambda: LookaheadCache(budget)),
        "lookahead, parked": (adapted, lambda: LookaheadCache(budget, park="cpu")),
        "lookahead, static": (adapted, lambda: LookaheadCache(budget, max_new_tokens=tokens)),
        "lookahead, parked, static": (adapted, lambda: LookaheadCache(budget, park="cpu", max_new_tokens=tokens)),
        "offloaded": (plain, lambda: DynamicCache(config=plain.config, offloading=True)),
    }
    results: dict[str, Any] = {"hardware": describe(), "prompt": prompt, "budget": budget, "turn": TURN}
    if DEVICE == "cpu" or options.hybrid:
        del rows["offloaded"]
    cells = {name: lambda each=each: converse(each[0], each[1](), prompt, tokens) for name, each in rows.items()}
    measure_all(cells, results, options.out, results)


if __name__ == "__main__":
    main()
