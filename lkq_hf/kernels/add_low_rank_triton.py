"""Triton kernel of `lkq_hf.kernels.add_low_rank`.

Small models wait for launches, not for products. So one launch does both: each thread block takes a few columns of the
result, and makes the short factor ``x @ down.T`` by itself.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lkq_hf.kernels.dispatch import ceil_div, interpreting, next_power_of_2
from lkq_hf.kernels.launch import OnDevice, RepeatedLaunch

_BLOCK_ROWS = 32
_BLOCK_OUT = 64


def add_low_rank_triton(result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float, length: int) -> None:
    batch, tokens, out_features = result.shape
    rank, in_features = down.shape
    launch = _launch(result.device, result.dtype, in_features, out_features, rank)
    grid = ceil_div(out_features, _BLOCK_OUT), ceil_div(length, _BLOCK_ROWS), batch
    launch(grid, result, x, down, up, float(scaling), tokens, length)


@cache
def _launch(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int, rank: int) -> OnDevice:
    constants = {
        "IN": in_features,
        "OUT": out_features,
        "RANK": rank,
        "BLOCK_ROWS": _BLOCK_ROWS,
        "BLOCK_IN": 64 if in_features <= 1024 else 128,
        "BLOCK_OUT": _BLOCK_OUT,
        "BLOCK_RANK": max(16, next_power_of_2(rank)),
        "INTERPRETED": interpreting(),
    }
    return OnDevice(device, RepeatedLaunch(_add_kernel, constants, num_warps=4, num_stages=4))


@triton.jit(do_not_specialize=["tokens", "length"])
def _add_kernel(
    result,
    x,
    down,
    up,
    scaling,
    tokens,
    length,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = (row < length)[:, None]
    place = (tl.program_id(2) * tl.cast(tokens, tl.int64) + tokens - length + row)[:, None]
    rank = tl.arange(0, BLOCK_RANK)
    feature = tl.arange(0, BLOCK_IN)
    hidden = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        inside = (start + feature < IN)[None, :]
        inputs = tl.load(x + place * IN + start + feature[None, :], mask=exists & inside, other=0.0)
        weights = tl.load(
            down + rank[:, None] * IN + start + feature[None, :], mask=(rank < RANK)[:, None] & inside, other=0.0
        )
        if INTERPRETED:  # its dot takes bfloat16 for integers
            inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
        hidden += tl.dot(inputs, tl.trans(weights))

    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    weights_up = tl.load(
        up + column[:, None] * RANK + rank[None, :], mask=(column < OUT)[:, None] & (rank < RANK)[None, :], other=0.0
    )
    factor = hidden.to(up.dtype.element_ty)
    if INTERPRETED:
        factor, weights_up = factor.to(tl.float32), weights_up.to(tl.float32)
    added = tl.dot(factor, tl.trans(weights_up))
    pointers = result + place * OUT + column[None, :]
    inside = exists & (column < OUT)[None, :]
    before = tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, (before + scaling * added).to(result.dtype.element_ty), mask=inside)
