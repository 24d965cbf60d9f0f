"""What evictions between the tokens of a long answer cost: an 8B Llama with random weights on one CUDA GPU.

    python benchmarks/refresh.py
    python benchmarks/refresh.py --small             # a smoke run on any machine

A prompt of 32,768 tokens, of which 1,024 entries a head are kept, and an answer with ``refresh_every=256``, with
storage that grows and with static shapes (compiled). A pass takes what its step takes more than the median step; the
first two passes, which compile and record, are listed apart. The slow-down is one pass for every 256 steps.
"""

import json
import statistics
import time
from typing import Any

import torch
from common import describe, parser, save
from decode_speed import DEVICE, LLAMA_8B, SMALL, StepClock, build_models
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
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
    )
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
    _, model = build_models(SMALL if options.small else LLAMA_8B)
    results: dict[str, Any] = {"hardware": describe(), "prompt": prompt, "budget": budget, "refresh_every": every}
    for scorer in options.scorers:
        for static in (True, False):
            name = f"{scorer}, {'static' if static else 'growing'}"
            results[name] = measure(model, scorer, prompt, budget, every, 5 if static else 3, static)
            print(name, json.dumps(results[name]), flush=True)
            save(options.out, results)


if __name__ == "__main__":
    main()
