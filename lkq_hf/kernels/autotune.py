"""Choose the fastest of several ways to compute the same thing, once for each shape."""

import time
from collections.abc import Callable, Hashable, Sequence
from statistics import median

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import interpreting

_fastest: dict[Hashable, int] = {}

# Of the largest value: what rounding to half precision leaves far below, and a wrong tile far above.
_TOLERANCE = 0.02
# Of a GPU at its fastest.
_CYCLES_PER_SECOND = 2e9


def run_fastest(key: Hashable, candidates: Sequence[Callable[[], Tensor]], plain: Callable[[], Tensor]) -> Tensor:
    """Run the way that was fastest when ``key`` was first seen; that first time, all are run, compared and timed.

    Compilers of kernels have faults of their own: a candidate whose result is not that of ``plain`` on this GPU is not
    chosen. While a CUDA graph is captured nothing can be timed: an unseen key then takes ``plain``, and is timed at
    its next call outside of a capture. In Triton's interpreter, where time means nothing, the first candidate runs.

    Args:
        key: everything on which the choice depends.
        candidates: the ways to try.
        plain: the way that is always right, and one of the choices.
    """
    if interpreting():
        return candidates[0]()
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return plain()
        expected = plain()
        times = [_milliseconds(candidate, expected) for candidate in (*candidates, plain)]
        if min(times) == float("inf"):  # inputs that are not finite tell nothing
            return expected
        _fastest[key] = times.index(min(times))
    return (*candidates, plain)[_fastest[key]]()


def choices() -> dict[Hashable, int]:
    """What was chosen so far: for every key the index of its fastest candidate, or their number for the plain way."""
    return dict(_fastest)


def _milliseconds(candidate: Callable[[], Tensor], expected: Tensor) -> float:
    """Infinite if the GPU cannot run the candidate, or its result is wrong."""
    from triton.runtime.errors import OutOfResources

    try:
        error = (candidate().float() - expected.float()).abs().max()
    except OutOfResources:  # a tile that this GPU's shared memory or registers cannot hold
        return float("inf")
    if not error <= _TOLERANCE * expected.float().abs().max():
        return float("inf")
    return time_on_gpu(candidate)


def time_on_gpu(run: Callable[[], object], repeats: int = 10) -> float:
    """Median milliseconds that the GPU takes for what ``run`` launches, from memory rather than from its L2 cache.

    A host is often slower in launching a kernel than a GPU in running it. So the GPU is kept busy until all repeats
    are launched: then it goes through them without waiting.
    """
    cache = torch.cuda.get_device_properties().L2_cache_size
    flushed = torch.empty(2 * cache, dtype=torch.int8, device="cuda")
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]

    def launch_all() -> None:
        for start, end in events:
            flushed.zero_()
            start.record()
            run()
            end.record()

    began = time.perf_counter()
    launch_all()
    launching = time.perf_counter() - began
    torch.cuda._sleep(int(2 * launching * _CYCLES_PER_SECOND))
    launch_all()
    events[-1][1].synchronize()
    return median(start.elapsed_time(end) for start, end in events)
