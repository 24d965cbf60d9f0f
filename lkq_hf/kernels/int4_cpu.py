"""Products with packed 4-bit weights on a CPU, by torch's own kernel for int4 weights.

The kernel reads weights in an order of its own. A weight is repacked when it is first used, and the repacked one is
kept as long as the weight lives, is not changed, and `release_repacked` is not called. Until then a weight takes twice
its memory: half a byte a weight more, and two numbers a group in the activations' dtype. That is still about half of
what bfloat16 weights take.
"""

import os
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lkq_hf.kernels.bit_stream import unpack
from lkq_hf.kernels.dispatch import ENVIRONMENT_VARIABLE

GROUP_SIZES = (32, 64, 128, 256)
"""Group sizes that torch's kernel takes."""

ROWS = {torch.bfloat16: 512, torch.float32: 4}
"""Up to so many rows the kernel is faster than unpacking the weight and multiplying, by the activations' dtype. In
float32 it is a plain loop."""


class _Repacked(NamedTuple):
    """A weight in the kernel's order, and what it was made from: addresses and versions of its three tensors."""

    stamp: tuple[tuple[int, int], ...]
    weight: Tensor
    scales_and_zeros: Tensor


_repacked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = Lock()


def fits_int4(x: Tensor, bits: int, group_size: int) -> bool:
    """Whether `int4_matmul` multiplies `x` with such a weight, and is faster than the reference."""
    if bits != 4 or x.device.type != "cpu" or group_size not in GROUP_SIZES or os.environ.get(ENVIRONMENT_VARIABLE):
        return False
    return 0 < x.numel() <= ROWS.get(x.dtype, 0) * x.shape[-1]


def int4_matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int, sym: bool) -> Tensor:
    """``x @ w`` for a packed 4-bit weight; arguments as `quantized_matmul` takes them.

    Scales and the products of scales and zero points are rounded once to the dtype of ``x``.
    """
    repacked = _find(qweight, qzeros, scales, sym, x.dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, repacked.weight, group_size, repacked.scales_and_zeros
    )
    return y.view(*x.shape[:-1], -1)


def release_repacked() -> None:
    """Gives the memory of all repacked weights back; the next product of each repacks it."""
    with _lock:
        _repacked.clear()


def _find(qweight: Tensor, qzeros: Tensor, scales: Tensor, sym: bool, dtype: torch.dtype) -> _Repacked:
    stamp = tuple(map(_stamp, (qweight, qzeros, scales)))
    with _lock:
        found: _Repacked | None = _repacked.get(qweight)
    if found is None or found.stamp != stamp or found.scales_and_zeros.dtype != dtype:
        same = found is not None and found.stamp == stamp
        weight = found.weight if found is not None and same else _repack(qweight)
        found = _Repacked(stamp, weight, _scales_and_zeros(qzeros, scales, sym, dtype))
        with _lock:
            _repacked[qweight] = found
    return found


def _stamp(tensor: Tensor) -> tuple[int, int]:
    # Of an inference tensor no version is kept.
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _repack(qweight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(qweight.t(), 4), 1)
    return packed


def _scales_and_zeros(qzeros: Tensor, scales: Tensor, sym: bool, dtype: torch.dtype) -> Tensor:
    """`[groups, out_features, 2]`: the scale, and what the kernel adds to `(q - 8) * scale`."""
    exact = scales.float()
    offsets = torch.zeros_like(exact) if sym else (8 - unpack(qzeros, 4)) * exact
    return torch.stack([exact, offsets], -1).to(dtype)
