"""What the response loses when the prompt's cache is evicted by an adapter's scores, differentiable in the scores."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lkq_hf.attention import bias_attention
from lkq_hf.training.importance import PromptCache, mean_over_query_heads

_BISECTIONS = 26


def soft_top_k(scores: torch.Tensor, budget: int, temperature: float) -> torch.Tensor:
    """Logarithms of gates between 0 and 1 that sum to ``budget``: a differentiable choice of the largest scores.

    A gate is ``sigmoid((score - threshold) / temperature)`` with the one threshold per row for which the gates sum to
    the budget. It moves with the scores, so what one entry gains others lose.

    Args:
        scores: ``[..., length]``; minus infinity on padding, whose gates are closed.
        budget: sum of the gates, below the number of real entries of every row.
        temperature: the lower, the harder the choice. In units of the scores.
    """
    padding = scores == -torch.inf
    with torch.no_grad():
        real = scores.masked_fill(padding, torch.inf)
        low = real.amin(-1, keepdim=True) - 30 * temperature
        high = scores.amax(-1, keepdim=True) + 30 * temperature
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_many = torch.sigmoid((scores - middle) / temperature).sum(-1, keepdim=True) > budget
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        threshold = (low + high) / 2
        gates = torch.sigmoid((scores - threshold) / temperature)
        # By the implicit function theorem, the threshold's gradient is the mean of the scores' at the slopes.
        slopes = gates * (1 - gates)
        slopes = slopes / slopes.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    # Infinities have no part in gradients: theirs would be undefined.
    finite = scores.masked_fill(padding, 0.0)
    threshold = threshold + (slopes * (finite - finite.detach())).sum(-1, keepdim=True)
    return F.logsigmoid((finite - threshold) / temperature).masked_fill(padding, -torch.inf)


def eviction_gates(
    scores: Mapping[int, torch.Tensor], kv_heads: int, budget: int, temperature: float, row_power: float = 1.0
) -> dict[int, torch.Tensor]:
    """Log-gates (:func:`soft_top_k`) of each layer's entries, by the logarithm of their score.

    Args:
        scores: by layer, ``[batch, heads, length]``: of each query head, as in training.
        kv_heads: number of KV heads, over whose query heads scores are averaged, as at eviction.
        budget: entries kept per KV head.
        temperature: in nats: at a temperature of 0.3 an entry with half of the threshold's score is one tenth open.
        row_power: exponent of the power mean that the scores were made with.
    """
    # The root of zero has no gradient: scores stay above what has the smallest normal number as its power.
    tiny = torch.finfo(torch.float32).tiny ** (1 / row_power)
    device = next(iter(scores.values())).device
    # All layers in one tensor: the bisection is many small steps.
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

    def bias(module: nn.Module, query: torch.Tensor) -> torch.Tensor | None:
        gate = gates.get(int(module.layer_idx))  # type: ignore[arg-type]
        if gate is None:
            return None
        causal = query.new_full((count, count), -torch.inf).triu(1)
        # Bounded, because a gradient through an infinite bias is undefined.
        prompt_part = gate.clamp(min=closed * 2).to(query)
        prompt_part = prompt_part.repeat_interleave(heads // gate.shape[1], 1)[:, :, None]
        batch = len(prompt_part)
        parts = prompt_part.expand(-1, -1, count, -1), causal.expand(batch, heads, -1, -1)
        return torch.cat(parts, -1)

    with bias_attention(decoder, bias):
        return model(**inputs).logits


def response_divergence(
    full: torch.Tensor, evicted: torch.Tensor, response_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """KL divergence of the next token's distribution over an evicted cache from that over the full one.

    Args:
        full, evicted: logits, ``[batch, response_length, vocabulary]``.
        response_mask: ``[batch, response_length]`` bool, True for real tokens; None if there is no padding.

    Returns:
        The mean over all tokens of all responses, in nats.
    """
    mask = torch.ones(full.shape[:2], dtype=torch.bool, device=full.device) if response_mask is None else response_mask
    targets, predicted = (logits[mask].float().log_softmax(-1) for logits in (full, evicted))
    return F.kl_div(predicted, targets, log_target=True, reduction="batchmean")
