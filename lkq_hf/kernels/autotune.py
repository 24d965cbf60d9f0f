"""Choose the fastest of several ways to compute the same thing, once for each shape."""

import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, interpreting

_fastest: dict[Hashable, int] = {}

# Of the largest value: what rounding to half precision leaves far below, and a wrong tile far above.
_TOLERANCE = 0.02
# Of the shortest time, up to which an earlier candidate is taken: so little changes from run to run.
_AS_FAST = 1.02
# Of a weight: to copy a tiny one until it fills the L2 cache would take longer than it is worth.
_MOST_COPIES = 64
# Of a GPU at its fastest.
_CYCLES_PER_SECOND = 2e9


def run_fastest(
    key: Hashable,
    candidates: Sequence[Callable[..., Tensor]],
    plain: Callable[..., Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
) -> Tensor:
    """Run the way that was fastest when ``key`` was first seen; that first time, all are run, compared and timed.

    Compilers of kernels have faults of their own: a candidate whose result is not that of ``plain`` on this GPU is not
    chosen. While a CUDA graph is captured nothing can be timed: an unseen key then takes ``plain``, and is timed at
    its next call outside of a capture. In Triton's interpreter, where time means nothing, the first candidate runs.

    Args:
        key: everything on which the choice depends.
        candidates: the ways to try; each takes ``x`` and the tensors of ``weight``. Of equally fast ones, the first is
            taken.
        plain: the way that is always right, and one of the choices; likewise.
        weight: what is read from memory. To time the ways it is copied, to at most twice the size of the L2 cache.
    """
    way = fastest(key, candidates, plain)
    if way is None:
        if torch.cuda.is_current_stream_capturing():
            return plain(x, *weight)
        expected = plain(x, *weight)
        weights = _copies(weight)
        times = [_milliseconds(partial(way, x), weights, expected) for way in (*candidates, plain)]
        if min(times) == float("inf"):  # inputs that are not finite tell nothing
            return expected
        _fastest[key] = next(i for i, time in enumerate(times) if time <= _AS_FAST * min(times))
        way = fastest(key, candidates, plain)
    return way(x, *weight)


def fastest(key: Hashable, candidates: Sequence[Callable[..., Tensor]], plain: Callable[..., Tensor]) -> Any:
    """What `run_fastest` has chosen; None if it has not yet."""
    if interpreting():
        return candidates[0] if candidates else None
    choice = _fastest.get(key)
    return None if choice is None else candidates[choice] if choice < len(candidates) else plain


def choices() -> dict[Hashable, int]:
    """What was chosen so far: for every key the index of its fastest candidate, or their number for the plain way."""
    return dict(_fastest)


def _milliseconds(candidate: Callable[..., Tensor], weights: Sequence[Sequence[Tensor]], expected: Tensor) -> float:
    """Infinite if the GPU cannot run the candidate, or its result is wrong."""
    from triton.runtime.errors import OutOfResources

    try:
        error = (candidate(*weights[0]).float() - expected.float()).abs().max()
    except OutOfResources:  # a tile that this GPU's shared memory or registers cannot hold
        return float("inf")
    if not error <= _TOLERANCE * expected.float().abs().max():
        return float("inf")
    return time_on_gpu(candidate, weights)


def _copies(weight: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """``weight`` and so many copies that going through them reads memory, not the L2 cache; of a small one, fewer."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in weight)
    cache = torch.cuda.get_device_properties(weight[0].device).L2_cache_size
    return [weight, *([tensor.clone() for tensor in weight] for _ in range(min(2 * cache // size, _MOST_COPIES)))]


def time_on_gpu(run: Callable[..., object], inputs: Sequence[Sequence[Tensor]], rounds: int = 5) -> float:
    """Milliseconds that the GPU takes for what ``run`` launches and a small kernel after it: the median of ``rounds``.

    One run follows another, as layers do, with an ordinary kernel in between, as there are elementwise ones: kernels
    that may start before the one ahead of them ends would look faster directly behind each other, and their order
    changes. A host is often slower in launching a kernel than a GPU in running it, so the GPU is kept busy until all
    are launched.

    Args:
        run: takes the tensors of one of ``inputs``.
        inputs: what the runs take, in turn.
        rounds: each at least ten runs.
    """
    runs = [*inputs] * ceil_div(10, len(inputs))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    between = torch.empty(4096, device=inputs[0][0].device)

    def launch_all() -> None:
        for tensors in runs:
            run(*tensors)
            between.zero_()

    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        launch_all()
        launching = time.perf_counter() - began
        torch.cuda._sleep(int(2 * launching * _CYCLES_PER_SECOND))
        start.record()
        launch_all()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(runs))
    return median(times)
