"""Launching a kernel again: what Triton is asked for, and how often."""

from typing import Any

import pytest

from lkq_hf.kernels import launch
from lkq_hf.kernels.launch import RepeatedLaunch


class Launched:
    """Records launches, as a function with ``triton.jit`` and as what that compiles."""

    def __init__(self, compiled: Any = None) -> None:
        self.compiled = compiled
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls.append((grid, arguments, options))
            return self.compiled

        return run


def test_triton_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    compiled = Launched()
    kernel = Launched(compiled)
    repeated = RepeatedLaunch(kernel, {"SIZE": 64, "SYM": True}, num_warps=4)
    for rows in (1, 2, 3):
        repeated((rows, 1, 1), "x", rows)
    assert kernel.calls == [((1, 1, 1), ("x", 1), {"SIZE": 64, "SYM": True, "num_warps": 4})]
    # What is compiled takes constants too, by place.
    assert compiled.calls == [((2, 1, 1), ("x", 2, 64, True), {}), ((3, 1, 1), ("x", 3, 64, True), {})]


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    kernel = Launched()
    repeated = RepeatedLaunch(kernel, {"SIZE": 64}, num_warps=4)
    for _ in range(2):
        repeated((1, 1, 1), "x")
    assert kernel.calls == [((1, 1, 1), ("x",), {"SIZE": 64})] * 2
