"""Choose the fastest of several ways to compute the same thing, once for each shape."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from lkq_hf.kernels.dispatch import interpreting

_fastest: dict[Hashable, int] = {}


def run_fastest(key: Hashable, candidates: Sequence[Callable[[], Any]]) -> Any:
    """Run the candidate that was fastest when ``key`` was first seen; that first time, all are run and timed.

    While a CUDA graph is captured nothing can be timed: an unseen key then takes the first candidate, and is timed at
    its next call outside of a capture. So it does in Triton's interpreter, where time means nothing.
    """
    if key not in _fastest and len(candidates) > 1:
        if interpreting() or torch.cuda.is_current_stream_capturing():
            return candidates[0]()
        times = [_milliseconds(candidate) for candidate in candidates]
        _fastest[key] = times.index(min(times))
    return candidates[_fastest.get(key, 0)]()


def choices() -> dict[Hashable, int]:
    """What was chosen so far: for every key the index of its fastest candidate."""
    return dict(_fastest)


def _milliseconds(candidate: Callable[[], Any]) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(candidate, warmup=2, rep=10, return_mode="median")
    except OutOfResources:  # a tile that this GPU's shared memory or registers cannot hold
        return float("inf")
