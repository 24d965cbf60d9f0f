"""Move the kept entries of each KV head into its segment of a pool."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import use_triton


def compact_segments(
    keep: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    starts: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_positions: Tensor,
) -> None:
    """Write the kept entries of each (row, KV head), in order, to ``out_*[start : start + number of kept ones]``.

    The rest of the outputs stays as it is. The Triton kernel does not wait for the device; the torch reference does.

    Args:
        keep: bool ``[batch, kv_heads, n]``.
        key: ``[batch, kv_heads, n, head_dim]``.
        value: ``[batch, kv_heads, n, value_dim]``.
        positions: int32 ``[batch, kv_heads, n]``.
        starts: int64 ``[batch, kv_heads]``. The caller leaves room for all kept entries: segments must not overlap.
        out_keys: ``[capacity, head_dim]`` in the dtype of ``key``; written.
        out_values: ``[capacity, value_dim]`` in the dtype of ``value``; written.
        out_positions: int32 ``[capacity]``; written.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: a dtype is not the expected one.
    """
    _check(keep, key, value, positions, starts, out_keys, out_values, out_positions)
    if use_triton(key, value):
        from lkq_hf.kernels.compact_segments_triton import compact_segments_triton

        compact_segments_triton(keep, key, value, positions, starts, out_keys, out_values, out_positions)
        return
    _reference(keep, key, value, positions, starts, out_keys, out_values, out_positions)


def _reference(
    keep: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    starts: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_positions: Tensor,
) -> None:
    places = (starts[..., None] + keep.cumsum(-1) - 1)[keep]
    out_keys[places] = key[keep]
    out_values[places] = value[keep]
    out_positions[places] = positions[keep]


def _check(
    keep: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    starts: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_positions: Tensor,
) -> None:
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must be bool, found {keep.dtype}.")
    capacity = out_positions.shape[0]
    expected_shapes = {
        "key": (key, [*keep.shape, key.shape[-1]]),
        "value": (value, [*keep.shape, value.shape[-1]]),
        "positions": (positions, [*keep.shape]),
        "starts": (starts, [*keep.shape[:2]]),
        "out_keys": (out_keys, [capacity, key.shape[-1]]),
        "out_values": (out_values, [capacity, value.shape[-1]]),
        "out_positions": (out_positions, [capacity]),
    }
    for name, (tensor, shape) in expected_shapes.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, found {list(tensor.shape)}.")
    expected_dtypes = {
        "positions": (positions, torch.int32),
        "starts": (starts, torch.int64),
        "out_keys": (out_keys, key.dtype),
        "out_values": (out_values, value.dtype),
        "out_positions": (out_positions, torch.int32),
    }
    for name, (tensor, dtype) in expected_dtypes.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, found {tensor.dtype}.")
