"""Triton kernel of `lkq_hf.kernels.dense_rows`: weights are read once, as fast as memory gives them.

Each thread block multiplies some outputs' weights with the row, a tile of inputs after the other, and adds up in
float32. It needs no second kernel for sums over parts, and starts while the kernel ahead of it ends.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lkq_hf.kernels.dispatch import ceil_div, dependent_launch

# The best of some forty tiles on an H200, within 4 % for each product of an 8B model.
_BLOCK_OUTPUTS = 8
_BLOCK_INPUTS = 512
_WARPS = 4
_STAGES = 3


def dense_rows_triton(row: Tensor, weights: list[Tensor]) -> Tensor:
    outputs = [weight.shape[0] for weight in weights]
    output = row.new_empty(1, sum(outputs))
    blocks = [ceil_div(count, _BLOCK_OUTPUTS) for count in outputs] + [0, 0]
    padded = [*weights, weights[-1], weights[-1]][:3]
    launch = dependent_launch(row.device)
    with torch.cuda.device_of(row):
        _rows_kernel[(sum(blocks),)](
            row,
            *padded,
            output,
            blocks[0],
            blocks[1],
            *(weight.shape[0] for weight in padded),
            INPUTS=row.shape[1],
            BLOCK_OUTPUTS=_BLOCK_OUTPUTS,
            BLOCK_INPUTS=_BLOCK_INPUTS,
            STAGES=_STAGES,
            DEPENDENT=bool(launch),
            num_warps=_WARPS,
            **launch,
        )
    return output


@triton.jit
def _rows_kernel(
    row,
    first_weight,
    second_weight,
    third_weight,
    output,
    first_blocks,
    second_blocks,
    first_outputs,
    second_outputs,
    third_outputs,
    INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Some outputs of one of the weights."""
    block = tl.program_id(0)
    weight, outputs = first_weight, first_outputs
    if block >= first_blocks:
        block -= first_blocks
        output += first_outputs
        weight, outputs = second_weight, second_outputs
        if block >= second_blocks:
            block -= second_blocks
            output += second_outputs
            weight, outputs = third_weight, third_outputs
    place = block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    column = tl.arange(0, BLOCK_INPUTS)
    weight += place[:, None].to(tl.int64) * INPUTS + column[None, :]
    sums = tl.zeros((BLOCK_OUTPUTS, BLOCK_INPUTS), tl.float32)
    if DEPENDENT:
        gdc_wait()
    for first in tl.range(0, INPUTS, BLOCK_INPUTS, num_stages=STAGES):
        inside = column < INPUTS - first
        inputs = tl.load(row + first + column, mask=inside, other=0.0).to(tl.float32)
        # Not needed again: the cache is for what other kernels read.
        tile = tl.load(
            weight + first,
            mask=(place < outputs)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        sums += tile.to(tl.float32) * inputs[None, :]
    if DEPENDENT:
        gdc_launch_dependents()
    tl.store(output + place, tl.sum(sums, 1).to(output.dtype.element_ty), mask=place < outputs)
