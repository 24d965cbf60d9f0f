from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``use_kernels("triton")`` or ``use_kernels("torch")`` forces that implementation for the rest of the test."""

    def force(implementation: str) -> None:
        if implementation == "triton":
            pytest.importorskip("triton")
        monkeypatch.setenv("LKQ_KERNELS", implementation)

    return force
