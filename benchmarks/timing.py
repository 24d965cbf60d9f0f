"""How long calls take on a GPU."""

from collections.abc import Callable

import torch

L2_BYTES = 256 * 2**20
"""What the data of the calls together should exceed: five times the L2 cache of an H200."""


def microseconds(calls: list[Callable[[], object]], repeats: int = 7, graph: bool = True) -> float:
    """Median time of one call, with all calls captured in one CUDA graph; without, the host launches each."""

    def run() -> None:
        for call in calls:
            call()

    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2] * 1e3 / len(calls)
