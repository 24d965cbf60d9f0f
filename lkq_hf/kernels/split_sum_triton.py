"""The second stage of kernels that share a sum between thread blocks: a fixed order, so the result is reproducible."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lkq_hf.kernels.dispatch import ceil_div, dependent_launch
from lkq_hf.kernels.launch import RepeatedLaunch

_LARGE = 2**18
_DIVISOR = tl.constexpr(16)  # of the results' sizes, which are packed weights': loads of several values count on it


def split_buffer(x: Tensor, columns: int, splits: int) -> Tensor:
    """Where thread blocks put their parts of a product of ``x``: the product itself, if nothing is to be added.

    Returns:
        `[splits, rows, columns]` in float32; for one split `[..., columns]` in the dtype of ``x``.
    """
    if splits == 1:
        return x.new_empty((*x.shape[:-1], columns))
    return x.new_empty((splits, x.numel() // x.shape[-1], columns), dtype=torch.float32)


def split_sum(x: Tensor, partial: Tensor, splits: int) -> Tensor:
    """The product of ``x`` `[..., columns]` from what `split_buffer` made."""
    if splits == 1:
        return partial
    _, rows, columns = partial.shape
    total = x.new_empty((*x.shape[:-1], columns))
    size = rows * columns
    block = 256 if size < _LARGE else 1024  # a thread's part of a large one is 16 bytes and more
    launch = _launch(x.device, x.dtype, splits, block)
    arguments = (partial.data_ptr(), total.data_ptr()) if launch.takes_addresses else (partial, total)
    launch((ceil_div(size, block), 1, 1), *arguments, size // _DIVISOR.value)
    return total


@cache
def _launch(device: torch.device, dtype: torch.dtype, splits: int, block: int) -> RepeatedLaunch:
    options = dependent_launch(device)
    constants = {"SPLITS": splits, "BLOCK": block, "DEPENDENT": bool(options)}
    return RepeatedLaunch(_split_sum_kernel, constants, **options)


@triton.jit(do_not_specialize=["size"])
def _split_sum_kernel(partial, total, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    size *= _DIVISOR
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    value = tl.zeros((BLOCK,), tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    for split in tl.static_range(SPLITS):
        value += tl.load(partial + split * size + index, mask=mask, other=0.0)
    tl.store(total + index, value.to(total.dtype.element_ty), mask=mask)
