"""What the response loses when the prompt's cache is evicted by an adapter's scores, differentiable in the scores."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lkq_hf.attention import bias_attention
from lkq_hf.training.importance import PromptCache, mean_over_query_heads


def soft_top_k(scores: torch.Tensor, budget: int, temperature: float) -> torch.Tensor:
    """Logarithms of gates between 0 and 1, open for the ``budget`` largest scores, with gradients to all scores.

    The gate of the entry of rank ``r`` is ``sigmoid(log((budget + 1/2) / r) / temperature)``: values depend on the
    order alone, so that nothing is won by scores that hardly differ, which would open all gates a little. Gradients
    are those of ``sigmoid((score - threshold) / temperature)`` with the threshold moving so that the sum of the gates
    stays what it is: what one entry gains others lose.

    Args:
        scores: ``[..., length]``; minus infinity on padding, whose gates are closed.
        budget: number of open gates.
        temperature: the lower, the harder the choice. At 0.1 an entry ranked a tenth beyond the budget is about a
            quarter open.
    """
    padding = scores == -torch.inf
    places = torch.arange(1, scores.shape[-1] + 1, device=scores.device).expand(scores.shape)
    ranks = torch.empty_like(places).scatter_(-1, scores.detach().argsort(-1, descending=True), places)
    openness = torch.log((budget + 0.5) / ranks.to(scores.dtype)) / temperature
    gates = torch.sigmoid(openness)
    slopes = (gates * (1 - gates)).masked_fill(padding, 0.0)
    slopes = slopes / slopes.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    # Infinities have no part in gradients: theirs would be undefined.
    finite = scores.masked_fill(padding, 0.0)
    change = finite - finite.detach()
    change = change - (slopes * change).sum(-1, keepdim=True)
    return F.logsigmoid(openness + change / temperature).masked_fill(padding, -torch.inf)


def eviction_gates(
    scores: Mapping[int, torch.Tensor], kv_heads: int, budget: int, temperature: float, row_power: float = 1.0
) -> dict[int, torch.Tensor]:
    """Log-gates (:func:`soft_top_k`) of each layer's entries, by the logarithm of their score.

    Args:
        scores: by layer, ``[batch, heads, length]``: of each query head, as in training.
        kv_heads: number of KV heads, over whose query heads scores are averaged, as at eviction.
        budget: entries kept per KV head.
        temperature: see :func:`soft_top_k`.
        row_power: exponent of the power mean that the scores were made with.
    """
    # The root of zero has no gradient: scores stay above what has the smallest normal number as its power.
    tiny = torch.finfo(torch.float32).tiny ** (1 / row_power)
    device = next(iter(scores.values())).device
    # All layers in one tensor: one sort instead of many.
    every = torch.stack([importance.to(device) for importance in scores.values()])
    mean = mean_over_query_heads(every.flatten(0, 1).clamp(min=tiny).pow(row_power), kv_heads).pow(1 / row_power)
    padding = every[:, :, :1].flatten(0, 1) == -torch.inf
    gates = soft_top_k(mean.log().masked_fill(padding, -torch.inf), budget, temperature)
    return dict(zip(scores, gates.unflatten(0, every.shape[:2]), strict=True))


def response_logits(
    model: nn.Module,
    decoder: PreTrainedModel,
    prompt: PromptCache,
    response_ids: torch.Tensor,
    response_mask: torch.Tensor | None = None,
    gates: Mapping[int, torch.Tensor] | None = None,
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

    Returns:
        ``[batch, response_length, vocabulary]``.
    """
    inputs = dict(**prompt.inputs(response_ids, response_mask), input_ids=response_ids, use_cache=True)
    if gates is None:
        return model(**inputs).logits
    count = response_ids.shape[1]
    heads = decoder.config.num_attention_heads
    closed = math.log(torch.finfo(torch.float16).tiny)
    causal = torch.full((count, count), -torch.inf, device=response_ids.device).triu(1)

    def bias(module: nn.Module, query: torch.Tensor) -> torch.Tensor | None:
        gate = gates.get(int(module.layer_idx))  # type: ignore[arg-type]
        if gate is None:
            return None
        # Bounded, because a gradient through an infinite bias is undefined.
        prompt_part = gate.clamp(min=closed * 2).to(query)
        prompt_part = prompt_part.repeat_interleave(heads // gate.shape[1], 1)[:, :, None]
        batch = len(prompt_part)
        parts = prompt_part.expand(-1, -1, count, -1), causal.to(query).expand(batch, heads, -1, -1)
        return torch.cat(parts, -1)

    with bias_attention(decoder, bias), _embeddings_with_gradients(decoder):
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
