"""Keep the best-scored keys and values of each KV head."""

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import use_triton


def select_compact(
    scores: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the ``k`` best-scored positions of each KV head, in the order in which they stand.

    Deterministic: among equal scores the earlier position wins.

    Args:
        scores: ``[batch, kv_heads, length]``, float32, no NaN.
        key: ``[batch, kv_heads, >= length, head_dim]``; positions from ``length`` on are never kept.
        value: ``[batch, kv_heads, >= length, value_dim]``.
        k: how many positions to keep, 1 to ``length``.
        out: where to write the kept keys and values, ``[batch, kv_heads, k, ...]`` each; new tensors when None.

    Returns:
        The kept keys ``[batch, kv_heads, k, head_dim]`` and values ``[batch, kv_heads, k, value_dim]``, and their
        positions ``[batch, kv_heads, k]``, int64, ascending.

    Raises:
        ValueError: the shapes do not fit together, or ``k`` is out of range.
        TypeError: ``scores`` is not float32, or ``out`` has another dtype than the keys and values.
    """
    _check(scores, key, value, k, out)
    if use_triton(scores, key, value):
        from lkq_hf.kernels.select_compact_triton import select_compact_triton

        return select_compact_triton(scores, key, value, k, out)
    return _reference(scores, key, value, k, out)


def _reference(
    scores: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # torch.topk promises no order among equal scores; a stable sort does.
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
    kept_key = key.gather(2, indices[..., None].expand(-1, -1, -1, key.shape[-1]))
    kept_value = value.gather(2, indices[..., None].expand(-1, -1, -1, value.shape[-1]))
    if out is not None:
        return out[0].copy_(kept_key), out[1].copy_(kept_value), indices
    return kept_key, kept_value, indices


def _check(
    scores: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    out: tuple[Tensor, Tensor] | None,
) -> None:
    if scores.dtype != torch.float32:
        raise TypeError(f"scores must be float32, found {scores.dtype}.")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.shape[:2] != scores.shape[:2] or tensor.shape[2] < scores.shape[-1]:
            raise ValueError(
                f"{name} must be [batch, kv_heads, >= length, head_dim] for scores [batch, kv_heads, length], "
                f"found {list(tensor.shape)} for {list(scores.shape)}."
            )
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be between 1 and the number of scored positions, {scores.shape[-1]}; found {k}.")
    if out is None:
        return
    for name, tensor, source in (("out[0]", out[0], key), ("out[1]", out[1], value)):
        expected = [*source.shape[:2], k, source.shape[3]]
        if list(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected}, found {list(tensor.shape)}.")
        if tensor.dtype != source.dtype:
            raise TypeError(f"{name} must be {source.dtype} like its source, found {tensor.dtype}.")
