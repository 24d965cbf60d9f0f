"""A refresh as a CUDA graph: its kernels run once, are recorded the next time, and are replayed from then on.

The host then launches one graph in the place of some two thousand kernels. What a graph reads and writes lies where it
lay when it was recorded, so it serves one cache with static shapes, as long as storage and weights stay in place.
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from lkq_hf.cache.steady import Inputs, SteadyRefresh
from lkq_hf.kernels.cuda_graph import record


class RecordedRefresh:
    """The graph of one cache. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._key: Any = None
        self._weights: list[tuple[int, int]] = []
        self._generation: object = None
        self._inputs: Inputs | None = None
        self._replay: Callable[[], None] | None = None
        self._fails = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecordedRefresh":
        return RecordedRefresh()

    def __reduce__(self) -> Any:
        return RecordedRefresh, ()

    def run(self, due: SteadyRefresh) -> None:
        """Does what ``due.run()`` does, by the graph where there is one."""
        key = due.storage(), due.settings()
        if key != self._key or not self._has_weights_of(due):
            self.__init__()  # type: ignore[misc]
            self._key, self._weights = key, _weights(due.decoder)
            due.run()
            return
        if self._replay is None and not self._fails:
            self._inputs = due.inputs
            try:
                self._replay = record(due.run, due.inputs.positions.device)
            except RuntimeError as error:
                self._fails = True
                warnings.warn(
                    "refreshes of this LookaheadCache are launched kernel by kernel, as they cannot be recorded as a "
                    f"CUDA graph: {error}",
                    stacklevel=2,
                )
        if self._replay is None or self._inputs is None:
            due.run()
            return
        self._inputs.take(due.inputs)
        self._replay()

    def _has_weights_of(self, due: SteadyRefresh) -> bool:
        # They do not change while `generate` runs, and looking at all of them takes as long as half a decode step.
        generation = due.cache.generation.current
        if generation is not None and generation is self._generation:
            return True
        self._generation = generation
        return self._weights == _weights(due.decoder)


def _weights(decoder: nn.Module) -> list[tuple[int, int]]:
    """Where each parameter lies, and how often it was written: adapters are converted to the model's dtype."""
    return [
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in decoder.parameters()
    ]
