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
    labels: Tensor | None = None,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the ``k`` best-scored positions of each KV head, in the order in which they stand.

    Deterministic: among equal scores the earlier position wins.

    Args:
        scores: ``[batch, kv_heads, length]``, float32, no NaN.
        key: ``[batch, kv_heads, >= length, head_dim]``; positions from ``length`` on are never kept.
        value: ``[batch, kv_heads, >= length, value_dim]``.
        k: how many positions to keep, 1 to ``length``.
        labels: int32 ``[batch, kv_heads, length]``, to be kept beside the keys and values, as the scores then are.
        out: where to write the kept keys and values, ``[batch, kv_heads, k, ...]`` each, and with ``labels`` the kept
            labels and scores, ``[batch, kv_heads, k]`` each; new tensors when None.

    Returns:
        The kept keys ``[batch, kv_heads, k, head_dim]`` and values ``[batch, kv_heads, k, value_dim]``, and their
        positions ``[batch, kv_heads, k]``, int64, ascending.

    Raises:
        ValueError: the shapes do not fit together, ``k`` is out of range, or there are labels and no ``out``.
        TypeError: ``scores`` is not float32, or ``out`` has another dtype than what is kept.
    """
    _check(scores, key, value, k, labels, out)
    if use_triton(scores, key, value):
        from lkq_hf.kernels.select_compact_triton import select_compact_triton

        return select_compact_triton(scores, key, value, k, labels, out)
    return _reference(scores, key, value, k, labels, out)


def _reference(
    scores: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    labels: Tensor | None,
    out: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # torch.topk promises no order among equal scores; a stable sort does.
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
    kept_key = key.gather(2, indices[..., None].expand(-1, -1, -1, key.shape[-1]))
    kept_value = value.gather(2, indices[..., None].expand(-1, -1, -1, value.shape[-1]))
    if out is None:
        return kept_key, kept_value, indices
    if labels is not None:
        out[2].copy_(labels.gather(-1, indices))
        out[3].copy_(scores.gather(-1, indices))
    return out[0].copy_(kept_key), out[1].copy_(kept_value), indices


def _check(
    scores: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    labels: Tensor | None,
    out: tuple[Tensor, ...] | None,
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
    if labels is not None and (labels.dtype != torch.int32 or labels.shape != scores.shape):
        raise ValueError(
            f"labels must be int32 {list(scores.shape)} as the scores, found {labels.dtype} {list(labels.shape)}."
        )
    expected = 2 if labels is None else 4
    if (out is None and labels is not None) or (out is not None and len(out) != expected):
        raise ValueError(
            f"out must have {expected} tensors {'with' if expected == 4 else 'without'} labels, found "
            f"{'none' if out is None else len(out)}."
        )
    if out is None:
        return
    kept = (*scores.shape[:2], k)
    shapes = ((key.dtype, key.shape[3:]), (value.dtype, value.shape[3:]), (torch.int32, ()), (torch.float32, ()))
    for index, (tensor, (dtype, features)) in enumerate(zip(out, shapes, strict=False)):
        if tensor.shape != (*kept, *features):
            raise ValueError(f"out[{index}] must be {[*kept, *features]}, found {list(tensor.shape)}.")
        if tensor.dtype != dtype:
            raise TypeError(f"out[{index}] must be {dtype} like its source, found {tensor.dtype}.")
