"""The second stage of kernels that share a sum between thread blocks: a fixed order, so the result is reproducible."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lkq_hf.kernels.dispatch import ceil_div, dependent_launch


def split_buffer(x: Tensor, columns: int, splits: int) -> Tensor:
    """Where thread blocks put their parts of a result: `[splits, rows, columns]`, in float32 if there are several."""
    dtype = x.dtype if splits == 1 else torch.float32
    return torch.empty(splits, x.shape[0], columns, dtype=dtype, device=x.device)


def split_sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the splits of :func:`split_buffer`: `[rows, columns]` in ``dtype``."""
    splits, rows, columns = partial.shape
    if splits == 1:
        return partial[0]
    total = torch.empty(rows, columns, dtype=dtype, device=partial.device)
    block = 256
    launch = dependent_launch(partial.device)
    _split_sum_kernel[(ceil_div(rows * columns, block),)](
        partial, total, rows * columns, SPLITS=splits, BLOCK=block, DEPENDENT=bool(launch), **launch
    )
    return total


@triton.jit
def _split_sum_kernel(partial, total, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    value = tl.zeros((BLOCK,), tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    for split in tl.static_range(SPLITS):
        value += tl.load(partial + split * size + index, mask=mask, other=0.0)
    tl.store(total + index, value.to(total.dtype.element_ty), mask=mask)
