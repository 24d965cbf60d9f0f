"""Full float32 matrix products: TF32 keeps ten bits of mantissa, too few for second moments and their factors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Turns TF32 off for float32 matrix products inside the block, and restores what was set before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
