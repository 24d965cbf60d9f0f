"""What the response loses when the prompt's cache is evicted by an adapter's scores, differentiable in the scores."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lkq_hf.attention import bias_attention
from lkq_hf.scoring.pooling import pool_scores
from lkq_hf.training.importance import PromptCache, mean_over_query_heads
from lkq_hf.training.recompute import recomputing_layers
from lkq_hf.training.soft_allocation import soft_share_out


def eviction_gates(
    scores: Mapping[int, torch.Tensor],
    kv_heads: Mapping[int, int],
    budget: int,
    temperature: float,
    row_power: float = 1.0,
    allocation: str = "global",
    pooling: Mapping[str, Any] | None = None,
) -> dict[int, torch.Tensor]:
    """Log-gates (`soft_share_out`) of the entries that a cache would keep.

    Args:
        scores: by layer, ``[batch, heads, length]``: of each query head, as in training.
        kv_heads: of each of these layers, over whose query heads scores are averaged, as at eviction.
        budget: mean number of entries per KV head.
        temperature: see `soft_top_k`.
        row_power: exponent of the power mean that the scores were made with.
        allocation: how the budget is shared out among heads.
        pooling: arguments of `pool_scores`; None for no pooling.

    Returns:
        By layer, ``[batch, kv_heads, length]``.
    """
    # The root of zero has no gradient: scores stay above what has the smallest normal number as its power.
    tiny = torch.finfo(torch.float32).tiny ** (1 / row_power)
    device = next(iter(scores.values())).device
    powers = (
        mean_over_query_heads(importance.to(device).clamp(min=tiny).pow(row_power), kv_heads[layer])
        for layer, importance in scores.items()
    )
    # All layers in one tensor, because a step is bound by the number of its operations.
    every = torch.cat(list(powers), dim=1).pow(1 / row_power)
    every = pool_scores(every, **(pooling or {"kernel_size": 1}))
    padding = next(iter(scores.values()))[:, :1] == -torch.inf
    logarithms = every.log().masked_fill(padding, -torch.inf).split([kv_heads[layer] for layer in scores], dim=1)
    gates = soft_share_out(logarithms, budget, allocation, temperature)
    return dict(zip(scores, gates, strict=True))


def response_logits(
    model: nn.Module,
    decoder: PreTrainedModel,
    prompt: PromptCache,
    response_ids: torch.Tensor,
    response_mask: torch.Tensor | None = None,
    gates: Mapping[int, torch.Tensor] | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """Logits of a response over a prompt's cache, of which ``gates`` may leave only a part.

    Args:
        model: the causal language model, wrapped for training in any way.
        decoder: its stack of decoder layers.
        prompt: the prompt's cache.
        response_ids: ``[batch, response_length]``, padded on the right.
        response_mask: ``[batch, response_length]`` bool, True for real tokens; None if there is no padding.
        gates: by layer, log-gates ``[batch, kv_heads, length]``, added to the attention's logits. Layers without
            gates attend to the whole prompt.
        recompute: whether the backward pass reads each layer again, so that little is held of it meanwhile.

    Returns:
        ``[batch, response_length, vocabulary]``.
    """
    inputs = dict(**prompt.inputs(response_ids, response_mask), input_ids=response_ids, use_cache=True)
    if gates is None:
        return model(**inputs).logits
    count = response_ids.shape[1]
    closed = math.log(torch.finfo(torch.float16).tiny)
    causal = torch.full((count, count), -torch.inf, device=response_ids.device).triu(1)

    def bias(module: nn.Module, query: torch.Tensor) -> torch.Tensor | None:
        gate = gates.get(int(module.layer_idx))  # type: ignore[arg-type]
        if gate is None:
            return None
        # Bounded, because a gradient through an infinite bias is undefined.
        prompt_part = gate.clamp(min=closed * 2).to(query)
        heads = query.shape[1]
        prompt_part = prompt_part.repeat_interleave(heads // gate.shape[1], 1)[:, :, None]
        batch = len(prompt_part)
        parts = prompt_part.expand(-1, -1, count, -1), causal.to(query).expand(batch, heads, -1, -1)
        return torch.cat(parts, -1)

    def biased() -> AbstractContextManager[None]:
        return bias_attention(decoder, bias)

    layers = recomputing_layers(decoder, biased) if recompute else nullcontext()
    with biased(), _embeddings_with_gradients(decoder), layers:
        return model(**inputs).logits


@contextmanager
def _embeddings_with_gradients(decoder: PreTrainedModel) -> Iterator[None]:
    """Lets the forwards inside record gradients from the first layer on, though neither tokens nor weights have any.

    Otherwise the first attention's bias alone has gradients. CUDA's memory-efficient attention keeps what its backward
    needs only if queries, keys or values have some, and fails there ("LSE is not correctly aligned").
    """
    embedding = decoder.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()


def response_divergence(
    full: torch.Tensor, evicted: torch.Tensor, response_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """KL divergence of the next token's distribution over an evicted cache from that over the full one.

    Args:
        full, evicted: logits, ``[batch, response_length, vocabulary]``.
        response_mask: ``[batch, response_length]`` bool, True for real tokens; None if there is no padding.

    Returns:
        The mean over responses of the mean over their tokens, in nats: the same for a batch and for its parts.
    """
    dtype = torch.promote_types(full.dtype, torch.float32)
    targets, predicted = (logits.to(dtype).log_softmax(-1) for logits in (full, evicted))
    divergence = F.kl_div(predicted, targets, reduction="none", log_target=True).sum(-1)
    if response_mask is None:
        return divergence.mean()
    # By a product: choosing by a mask makes the host wait for the device.
    return ((divergence * response_mask).sum(-1) / response_mask.sum(-1)).mean()
