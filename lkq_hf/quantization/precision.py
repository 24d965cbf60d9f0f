"""In which precision float32 matrices are multiplied on a GPU.

TF32 keeps ten bits of mantissa: too few for second moments and their factors, enough for gradients.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def full_float32() -> AbstractContextManager[None]:
    """Full float32 inside the block; what was set before is restored."""
    return _products("highest")


def tf32() -> AbstractContextManager[None]:
    """TF32 inside the block; what was set before is restored."""
    return _products("high")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
