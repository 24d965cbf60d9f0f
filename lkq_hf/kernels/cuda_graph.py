"""Recording of what is asked of a GPU, as a CUDA graph."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

_lock = threading.Lock()


def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Records what ``run`` asks of a GPU, without doing it; returns what does it.

    Raises:
        RuntimeError: it waits for the GPU, or there is no memory.
    """
    try:
        return _capture(run, device)
    except torch.OutOfMemoryError:
        # A graph has memory of its own, and cannot take what torch keeps for others.
        torch.cuda.empty_cache()
        return _capture(run, device)


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """What waits for the GPU inside is a RuntimeError: whether something can be recorded.

    A recording that fails is worse: torch's allocator takes it for one that goes on, and frees nothing anymore.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # torch records one graph at a time; other threads go on with what they do.
    with _lock, torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: products have working memory for each stream."""
    return torch.cuda.Stream(device)
