"""What evictions between the tokens of a long answer cost: an 8B Llama with random weights on one CUDA GPU.

    python benchmarks/refresh.py
    python benchmarks/refresh.py --small             # a smoke run on any machine

A prompt of 32,768 tokens, of which 1,024 entries a head are kept, and an answer with ``refresh_every=256``, with
storage that grows and with static shapes (compiled). A pass takes what its step takes more than the median step; the
first two passes, which compile and record, are listed apart. The slow-down is one pass for every 256 steps.
"""

import statistics
import time
from functools import partial
from typing import Any

import torch
from common import DEVICE, LLAMA_8B, SMALL, answer, describe, measure_all, parser, random_models
from decode_speed import StepClock
from tables import RESULTS

from lkq_hf import LookaheadCache

FIRST = 2


class Noted(LookaheadCache):
    """Notes before which tokens it is refreshed."""

    def __init__(self, clock: StepClock, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.clock, self.refreshed = clock, list[int]()

    def refresh_is_due(self) -> bool:
        due = super().refresh_is_due()
        if due:
            self.refreshed.append(len(self.clock.marks))
        return due


def measure(
    model: Any, scorer: str, prompt: int, budget: int, every: int, passes: int, static: bool
) -> dict[str, Any]:
    tokens, clock = (passes + 1) * every + 4, StepClock()
    cache = Noted(clock, budget, scorer, max_new_tokens=tokens if static else None, refresh_every=every)
    ids = torch.randint(model.config.vocab_size, (1, prompt), device=DEVICE)
    start = time.perf_counter()
    answer(model, ids, cache, tokens, streamer=clock)
    steps = clock.milliseconds()
    step = statistics.median(steps)
    each = [steps[index - 1] - step for index in cache.refreshed]
    middle = statistics.median(each[FIRST:])
    return {
        "step_ms": step,
        "first_passes_ms": each[:FIRST],
        "passes_ms": each[FIRST:],
        "decode_steps": middle / step,
        "slow_down_percent": 100 * middle / (every * step),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    arguments = parser(__doc__, RESULTS / "refresh.json")
    arguments.add_argument("--small", action="store_true")
    arguments.add_argument("--scorers", nargs="+", default=["lookahead", "snapkv"])
    options = arguments.parse_args()
    prompt, budget, every = (512, 32, 16) if options.small else (32_768, 1024, 256)
    _, model = random_models(SMALL if options.small else LLAMA_8B)
    results: dict[str, Any] = {"hardware": describe(), "prompt": prompt, "budget": budget, "refresh_every": every}
    cells = {
        f"{scorer}, {storage}": partial(measure, model, scorer, prompt, budget, every, passes, storage == "static")
        for scorer in options.scorers
        for storage, passes in (("static", 5), ("growing", 3))
    }
    measure_all(cells, results, options.out, results)


if __name__ == "__main__":
    main()
