"""How much attention the last queries of a sequence pay to every key before them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import use_triton

_CHUNK_BYTES = 64 * 2**20  # what the reference may allocate at a time, whatever the length


def lookahead_scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    softcap: float | None = None,
    row_power: float = 1.0,
    reduce_heads: bool = True,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mean attention of the last ``n`` positions to each of the ``length`` positions before them.

    Each of the ``n`` rows is a softmax over the ``length`` keys and the causal part of the rows' own ``n`` keys; the
    score of a key is the mean of its column. With lookahead tokens as the last positions this is the importance that
    LookaheadKV (arXiv 2603.10899) ranks by; with the last tokens of the prompt it is SnapKV's (arXiv 2404.14469);
    with the tokens of a response it is what both estimate. Differentiable in ``query`` and ``key``; neither direction
    holds the matrix of ``n`` rows.

    Args:
        query: ``[batch, heads, n, head_dim]``, position-encoded, the queries of the last ``n`` positions.
        key: ``[batch, kv_heads, length + n, head_dim]``, position-encoded; the last ``n`` are the same positions' own
            keys. ``heads`` is a multiple of ``kv_heads``, and query head ``h`` attends to KV head
            ``h // (heads // kv_heads)``.
        scaling: factor on the dot products, commonly ``head_dim ** -0.5``.
        mask: ``[batch, length]`` bool, or ``[batch, kv_heads, length]`` where heads hold different tokens; True for a
            real token. Padding gets no attention and a score of ``-inf``.
        row_mask: ``[batch, n]`` bool, True for a row that counts in the mean (responses of a batch differ in length).
        softcap: soft capping of the logits, ``softcap * tanh(logits / softcap)`` (Gemma 2).
        row_power: exponent of the power mean down a column, ``mean(p ** row_power) ** (1 / row_power)``. 1 is the
            mean of the papers; 2, the root mean square, counts an entry that few rows need much for more than one
            that all rows need a little.
        reduce_heads: take the mean over the query heads of each KV head as well.
        sinks: ``[heads]`` or ``[batch, heads]``, for each query head one logit more in its softmax, of no key
            (gpt-oss). No gradient goes to it.

    Returns:
        float32 scores, ``[batch, kv_heads, length]``, or ``[batch, heads, length]`` without ``reduce_heads``. (float64
        for float64 inputs.)

    Raises:
        ValueError: the shapes do not fit together, or ``row_power`` is not positive.
        TypeError: a mask is not boolean.
    """
    if mask is not None and mask.dim() == 3:
        return _head_by_head(query, key, scaling, mask, row_mask, sinks, softcap, row_power, reduce_heads)
    _check(query, key, mask, row_mask, sinks)
    if not row_power > 0:
        raise ValueError(f"row_power must be positive, found {row_power}.")
    inputs = query, key, mask, row_mask, _rows_of_sinks(sinks, query, key), scaling, softcap, row_power, reduce_heads
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return _LookaheadScores.apply(*inputs)
    return _scores_and_lse(*inputs)[0]


def _rows_of_sinks(sinks: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """``[batch, kv_heads, ratio, n]``: of every row its head's."""
    if sinks is None:
        return None
    batch, heads, n, _ = query.shape
    rows = sinks.detach().to(_accumulator(query)).expand(batch, heads)
    return rows.unflatten(1, (key.shape[1], -1))[..., None].expand(-1, -1, -1, n)


def _head_by_head(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor,
    row_mask: Tensor | None,
    sinks: Tensor | None,
    *settings: Any,
) -> Tensor:
    """A mask for each KV head: as if the KV heads were rows of the batch."""
    if query.shape[1] % key.shape[1] or mask.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"Expected a mask [batch, length] or [batch, kv_heads, length] for key {list(key.shape)} and query "
            f"{list(query.shape)}, found {list(mask.shape)}."
        )
    kv_heads = key.shape[1]
    softcap, row_power, reduce_heads = settings
    scores = lookahead_scores(
        query.unflatten(1, (kv_heads, -1)).flatten(0, 1),
        key.flatten(0, 1)[:, None],
        scaling,
        mask=mask.flatten(0, 1),
        row_mask=None if row_mask is None else row_mask.repeat_interleave(kv_heads, dim=0),
        softcap=softcap,
        row_power=row_power,
        reduce_heads=reduce_heads,
        sinks=None if sinks is None else sinks.expand(query.shape[:2]).unflatten(1, (kv_heads, -1)).flatten(0, 1),
    )
    return scores.unflatten(0, (-1, kv_heads)).flatten(1, 2)


def _scores_and_lse(query: Tensor, key: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    if use_triton(query, key):
        from lkq_hf.kernels.lookahead_scores_triton import lookahead_scores_triton

        return lookahead_scores_triton(query, key, *settings)
    return _reference(query, key, *settings)


class _LookaheadScores(torch.autograd.Function):
    """Keeps only each row's log-sum-exp, in as many splits as the forward made, and recomputes the logits from it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        row_mask: Tensor | None,
        sinks: Tensor | None,
        scaling: float,
        softcap: float | None,
        row_power: float,
        reduce_heads: bool,
    ) -> Tensor:
        settings = (scaling, softcap, row_power, reduce_heads)
        scores, partial_lse = _scores_and_lse(query, key, mask, row_mask, sinks, *settings)
        ctx.save_for_backward(query, key, mask, row_mask, partial_lse, scores)
        ctx.settings = settings
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_query, grad_key = _reference_backward(grad, *ctx.saved_tensors, *ctx.settings)
        return grad_query, grad_key, None, None, None, None, None, None, None


def _reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    row_mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    row_power: float,
    reduce_heads: bool,
) -> tuple[Tensor, Tensor]:
    """The scores, and the log-sum-exp of each row over each split, ``[batch, kv_heads, splits, ratio * n]``."""
    batch, kv_heads, total, _ = key.shape
    heads, n = query.shape[1:3]
    lse = query.new_full((batch, kv_heads, heads // kv_heads, n), -torch.inf, dtype=_accumulator(query))
    if sinks is not None:
        lse = sinks.contiguous()
    for _, logits in _logit_chunks(query, key, total, mask, scaling, softcap):
        lse = torch.logaddexp(lse, logits.logsumexp(-1))

    scores = lse.new_empty(batch, kv_heads, heads // kv_heads, total - n)
    weights = _row_weights(query, row_mask)
    for chunk, logits in _logit_chunks(query, key, total - n, mask, scaling, softcap):
        powers = logits.sub_(lse[..., None]).mul_(row_power).exp_()
        scores[..., chunk] = (powers * weights[..., None]).sum(-2)
    scores = scores.mean(2) if reduce_heads else scores.flatten(1, 2)
    if row_power != 1:
        scores = scores.pow_(1 / row_power)
    return scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf), lse.flatten(2)[:, :, None]


def _reference_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    row_mask: Tensor | None,
    partial_lse: Tensor,
    scores: Tensor,
    scaling: float,
    softcap: float | None,
    row_power: float,
    reduce_heads: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``query`` and ``key``: d logits = p * (g - sum p g), where g is the gradient of p.

    For a power mean s of exponent k, g holds the factor (p / s) ** (k - 1).
    """
    batch, kv_heads, total, head_dim = key.shape
    heads, n = query.shape[1:3]
    ratio = heads // kv_heads
    if mask is not None:
        grad = grad.masked_fill(~mask[:, None], 0)

    def per_row(columns: Tensor) -> Tensor:
        """From a tensor of the scores' shape; the rows' own keys have no score."""
        columns = columns[:, :, None] if reduce_heads else columns.unflatten(1, (kv_heads, ratio))
        return torch.nn.functional.pad(columns, (0, n))[..., None, :]

    grad = per_row(grad / ratio if reduce_heads else grad)
    # In the exponent, where a large power of a small score is no trouble. A score that underflowed has no gradient.
    offset = None if row_power == 1 else per_row((row_power - 1) * scores.log().masked_fill(scores <= 0, torch.inf))
    weights = _row_weights(query, row_mask)[..., None]
    lse = partial_lse.logsumexp(2).unflatten(-1, (ratio, n))

    def weighted(log_probability: Tensor, chunk: slice) -> Tensor:
        """p * g."""
        if offset is not None:
            log_probability = log_probability * row_power - offset[..., chunk]
        return log_probability.exp() * (grad[..., chunk] * weights)

    row_sum = torch.zeros_like(lse)
    for chunk, logits in _logit_chunks(query, key, total - n, mask, scaling, softcap):
        row_sum += weighted(logits.sub_(lse[..., None]), chunk).sum(-1)

    rows = query.to(lse.dtype).reshape(batch, kv_heads, ratio * n, head_dim)
    grad_rows, grad_key = torch.zeros_like(rows), torch.empty_like(key)
    for chunk, logits in _logit_chunks(query, key, total, mask, scaling, softcap):
        log_probability = logits - lse[..., None]
        grad_logits = weighted(log_probability, chunk) - log_probability.exp_() * row_sum[..., None]
        if softcap is not None:
            # A masked logit is -inf, and its gradient is zero already.
            grad_logits *= 1 - (logits.clamp(min=-softcap) / softcap) ** 2
        grad_logits = grad_logits.reshape(batch, kv_heads, ratio * n, -1) * scaling
        grad_rows += grad_logits @ key[:, :, chunk].to(rows.dtype)
        grad_key[:, :, chunk] = grad_logits.transpose(-1, -2) @ rows
    return grad_rows.reshape(query.shape).to(query.dtype), grad_key


def _logit_chunks(
    query: Tensor,
    key: Tensor,
    stop: int,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of the first ``stop`` keys, ``[batch, kv_heads, heads // kv_heads, n, chunk]``; -inf is not visible."""
    batch, kv_heads, total, head_dim = key.shape
    heads, n = query.shape[1:3]
    dtype = _accumulator(query)
    rows = query.to(dtype).reshape(batch, kv_heads, -1, head_dim) * scaling
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, n), value=True)
    last_visible = torch.arange(total - n, total, device=key.device)[:, None]

    # Three matrices of logits live at a time (with a copy for an operation that is not in place), and one of keys.
    column_bytes = dtype.itemsize * batch * (3 * heads * n + kv_heads * head_dim)
    size = max(1, _CHUNK_BYTES // column_bytes)
    for start in range(0, stop, size):
        chunk = slice(start, min(start + size, stop))
        logits = rows @ key[:, :, chunk].to(dtype).transpose(-1, -2)
        logits = logits.view(batch, kv_heads, heads // kv_heads, n, -1)
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        if chunk.stop > total - n:
            hidden = torch.arange(chunk.start, chunk.stop, device=key.device) > last_visible
            logits.masked_fill_(hidden, -torch.inf)
        if mask is not None:
            logits.masked_fill_(~mask[:, None, None, None, chunk], -torch.inf)
        yield chunk, logits


def _row_weights(query: Tensor, row_mask: Tensor | None) -> Tensor:
    """The weight of each row in the mean, ``[batch or 1, 1, 1, n]``."""
    n = query.shape[2]
    if row_mask is None:
        return query.new_full((1, 1, 1, n), 1 / n, dtype=_accumulator(query))
    weights = row_mask / row_mask.sum(-1, keepdim=True).clamp(min=1)
    return weights[:, None, None].to(_accumulator(query))


def _accumulator(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _check(query: Tensor, key: Tensor, mask: Tensor | None, row_mask: Tensor | None, sinks: Tensor | None) -> None:
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "Expected query [batch, heads, n, head_dim] and key [batch, kv_heads, length + n, head_dim], "
            f"found {list(query.shape)} and {list(key.shape)}."
        )
    batch, heads, n, _ = query.shape
    kv_heads, total = key.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"The {heads} query heads cannot be shared out among {kv_heads} KV heads.")
    if total < n:
        raise ValueError(f"key must end with the keys of the {n} queries themselves, found only {total} keys.")
    if sinks is not None and tuple(sinks.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"sinks must be [{heads}] or {[batch, heads]}, found {list(sinks.shape)}.")
    for name, value, expected in (("mask", mask, (batch, total - n)), ("row_mask", row_mask, (batch, n))):
        if value is None:
            continue
        if value.dtype != torch.bool:
            raise TypeError(f"{name} must be boolean (True for a real token), found {value.dtype}.")
        if tuple(value.shape) != expected:
            raise ValueError(f"{name} must be {list(expected)}, found {list(value.shape)}.")
