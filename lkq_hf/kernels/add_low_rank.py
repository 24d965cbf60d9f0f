"""Add a product of low rank to the last positions of a result, as a LoRA on these positions does."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lkq_hf.kernels.dispatch import use_triton

_MOST_INPUTS = 4096
"""Beyond, every thread block of the kernel would read too much: two products are faster."""

_LARGEST_RANK = 64

_DTYPES = (torch.bfloat16, torch.float16)


def add_low_rank(result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float, length: int) -> None:
    """``result[:, -length:] += scaling * x[:, -length:] @ down.T @ up.T``, in place.

    ``x @ down.T`` is rounded to the dtype; what is added to the result is not. Not differentiable.

    Args:
        result: ``[batch, tokens, out_features]``, written.
        x: ``[batch, tokens, in_features]``.
        down: ``[rank, in_features]``.
        up: ``[out_features, rank]``.
        scaling: of the product.
        length: positions, at most ``tokens``.
    """
    if _suits_kernel(result, x, down, up):
        from lkq_hf.kernels.add_low_rank_triton import add_low_rank_triton

        add_low_rank_triton(result, x, down, up, scaling, length)
        return
    start = x.shape[1] - length
    hidden = F.linear(x.narrow(1, start, length), down)
    result.narrow(1, start, length).baddbmm_(hidden, up.T.expand(x.shape[0], -1, -1), alpha=scaling)


def _suits_kernel(result: Tensor, x: Tensor, down: Tensor, up: Tensor) -> bool:
    rank, in_features = down.shape
    return (
        rank <= _LARGEST_RANK
        and in_features <= _MOST_INPUTS
        and result.dtype in _DTYPES
        and result.dtype == x.dtype == down.dtype == up.dtype
        and not torch.compiler.is_compiling()
        and use_triton(result)
        and all(tensor.is_contiguous() for tensor in (result, x, down, up))
        and not (result.data_ptr() | x.data_ptr() | down.data_ptr() | up.data_ptr()) % 16
    )
