"""How important each prompt entry is to a response, and what an adapter predicts, without passing the prompt twice.

A prompt's activations depend on neither the response nor the adapter. So one forward without gradients reads the
prompt into a cache, and the response and the lookahead tokens are read on top of it, each in a forward of their own
few positions (LookaheadKV, arXiv 2603.10899, section 3).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lkq_hf.attention import Observer, lookahead_positions, observe_attention
from lkq_hf.cache.cache import LookaheadCache
from lkq_hf.cache.layers import EvictedLayer
from lkq_hf.cache.modules import forgets, recurrent_modules
from lkq_hf.cache.suffix import suffix_inputs
from lkq_hf.compat import pass_cache
from lkq_hf.kernels.lookahead_scores import lookahead_scores
from lkq_hf.training.recompute import recomputing_layers


class PromptCache(DynamicCache):
    """The full cache of a prompt that later forwards read and do not change.

    Args:
        decoder: stack of decoder layers.
        input_ids: ``[batch, length]``, padded on the left.
        attention_mask: ``[batch, length]``, 1 for real tokens; None if there is no padding.
        model: what to call instead of the decoder: the whole model, where its weights are gathered by a wrapper.

    Raises:
        NotImplementedError: the decoder has recurrent modules that do not go on from their state.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        model: nn.Module | None = None,
    ) -> None:
        if any(forgets(module) for module in recurrent_modules(decoder)):
            raise NotImplementedError(
                f"the Mamba 1 layers of {type(decoder).__name__} forget their state when they read several tokens, so "
                "no adapter can be trained for them. Choose a scorer that needs none, such as "
                'LookaheadCache(budget=..., scorer="snapkv").'
            )
        super().__init__(config=decoder.config)
        self._frozen = False
        self.mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        with torch.no_grad():
            _read(decoder, model, **self.inputs(input_ids), input_ids=input_ids)
        self._frozen = True

    def inputs(self, tokens: torch.Tensor, token_mask: torch.Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments for a forward of ``tokens`` (``[batch, count, ...]``) that follow what was read so far."""
        batch, count = tokens.shape[:2]
        length = self.get_seq_length()
        if self.mask is None and token_mask is None:
            return pass_cache(self)
        prompt = self.mask if self.mask is not None else tokens.new_ones(batch, length, dtype=torch.bool)
        if length == 0:
            mask = prompt
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        else:
            new = token_mask if token_mask is not None else tokens.new_ones(batch, count, dtype=torch.bool)
            mask = torch.cat([prompt, new], dim=-1)
            positions = prompt.sum(-1, keepdim=True) + torch.arange(count, device=tokens.device)
        return pass_cache(self) | {"attention_mask": mask.long(), "position_ids": positions}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)

    # A recurrent or convolutional module goes on from the state that the prompt left, and leaves it.

    def is_recording_past(self, layer_idx: int) -> bool:
        return self._frozen or super().is_recording_past(layer_idx)  # modules then do not change the state in place

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        if not self._frozen:
            return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.conv_states[state_idx], conv_states], dim=-1)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state = super().get_recurrent_state(layer_idx, state_idx)
        return state.clone() if self._frozen and state is not None else state

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        if not self._frozen:
            return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        return recurrent_states

    def kv_heads(self, layer_idx: int) -> int:
        """Heads whose entries a cache keeps or drops each by themselves: 1 where a layer has a latent for all."""
        layer: Any = self.layers[layer_idx]
        return layer.keys.shape[1]


def _read(decoder: nn.Module, model: nn.Module | None, positions: int = 1, **inputs: Any) -> torch.Tensor:
    """The output of one forward into a cache: of the decoder, or of the model around it (the last positions' logits).

    Some decoders let only these positions into their last layers.
    """
    if model is None:
        return decoder(**inputs, use_cache=True)[0]
    return model(**inputs, use_cache=True, logits_to_keep=positions)[0]


def compressed_layers(decoder: PreTrainedModel) -> list[int]:
    """Indices of the layers that a LookaheadCache compresses.

    Raises:
        NotImplementedError: the model has layers that a LookaheadCache cannot hold.
    """
    cache = LookaheadCache(budget=1)
    cache.build_layers(decoder.config)
    return [index for index, layer in enumerate(cache.layers) if isinstance(layer, EvictedLayer)]


def response_importance(
    decoder: PreTrainedModel,
    prompt: PromptCache,
    response_ids: torch.Tensor,
    response_mask: torch.Tensor | None = None,
    row_power: float = 1.0,
    model: nn.Module | None = None,
) -> dict[int, torch.Tensor]:
    """Mean attention of a response to each prompt entry: what an adapter learns to predict.

    Args:
        decoder: stack of decoder layers.
        prompt: the prompt's cache.
        response_ids: ``[batch, response_length]``, padded on the right.
        response_mask: ``[batch, response_length]`` bool, True for real tokens; None if there is no padding.
        row_power: exponent of the power mean over the response's tokens.
        model: what to call instead of the decoder, see `PromptCache`.

    Returns:
        For each compressed layer, float32 ``[batch, heads, length]``; minus infinity on padding.
    """
    scores, observe = _recorder(decoder, prompt, response_mask, row_power)
    with torch.no_grad(), observe_attention(decoder, observe):
        _read(decoder, model, **prompt.inputs(response_ids, response_mask), input_ids=response_ids)
    return scores


def read_response(
    model: nn.Module,
    decoder: PreTrainedModel,
    prompt: PromptCache,
    response_ids: torch.Tensor,
    response_mask: torch.Tensor | None = None,
    row_power: float = 1.0,
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """`response_importance`, and the logits of the same forward, ``[batch, response_length, vocabulary]``."""
    scores, observe = _recorder(decoder, prompt, response_mask, row_power)
    inputs = prompt.inputs(response_ids, response_mask)
    with torch.no_grad(), observe_attention(decoder, observe):
        logits = model(**inputs, input_ids=response_ids, use_cache=True).logits
    return scores, logits


def lookahead_importance(
    model: nn.Module,
    decoder: PreTrainedModel,
    prompt: PromptCache,
    tokens: torch.Tensor,
    row_power: float = 1.0,
    rows: torch.Tensor | None = None,
    recompute: bool = False,
) -> dict[int, torch.Tensor]:
    """What the active adapter predicts for each prompt entry, with gradients.

    Args:
        model: what to call: the causal language model, wrapped for training in any way.
        decoder: its stack of decoder layers.
        prompt: the prompt's cache.
        tokens: the adapter's lookahead tokens, ``[1, count, hidden]``.
        row_power: exponent of the power mean over them.
        rows: their embeddings for each layer, ``[1, count, layers, hidden_per_layer]``, where the model has such.
        recompute: whether the backward pass reads each layer again, so that little is held of it meanwhile.

    Returns:
        For each compressed layer, float32 ``[batch, heads, length]``; minus infinity on padding.
    """
    scores, observe = _recorder(decoder, prompt, None, row_power)
    count = tokens.shape[1]
    keys = (getattr(layer, "keys", None) for layer in prompt.layers)
    batch = next(tensor.shape[0] for tensor in keys if tensor is not None)
    inputs = suffix_inputs(decoder, tokens, rows, batch)

    @contextmanager
    def looking_ahead(observer: Observer) -> Iterator[None]:
        with lookahead_positions(count, (batch, count)), observe_attention(decoder, observer):
            yield

    def again() -> AbstractContextManager[None]:
        return looking_ahead(_recorder(decoder, prompt, None, row_power)[1])  # the scores are known already

    layers = recomputing_layers(decoder, again) if recompute else nullcontext()
    with looking_ahead(observe), layers:
        logits = _read(decoder, model, count, **prompt.inputs(inputs["inputs_embeds"]), **inputs)
    if torch.is_grad_enabled():
        # Wrappers learn from the gradient of the model's output that a backward pass begins, and wait for one of every
        # parameter, also of those behind the last scored attention.
        last = max(scores)
        scores[last] = scores[last] + (0.0 * logits.sum()).nan_to_num().to(scores[last])
    return scores


def _recorder(
    decoder: PreTrainedModel, prompt: PromptCache, row_mask: torch.Tensor | None, row_power: float
) -> tuple[dict[int, torch.Tensor], Observer]:
    """Scores by layer, and the observer that fills them in during a forward."""
    scores: dict[int, torch.Tensor] = {}
    layers = set(compressed_layers(decoder))

    def observe(module: nn.Module, query: torch.Tensor, key: torch.Tensor, _: torch.Tensor, options: dict) -> None:
        if module.layer_idx in layers:
            scores[int(module.layer_idx)] = _per_head_scores(query, key, options, prompt, row_mask, row_power)

    return scores, observe


def _per_head_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    options: dict,
    prompt: PromptCache,
    row_mask: torch.Tensor | None,
    row_power: float,
) -> torch.Tensor:
    scaling = options.get("scaling")
    return lookahead_scores(
        query,
        key,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=None if prompt.mask is None else prompt.mask.to(key.device),
        row_mask=row_mask,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        row_power=row_power,
        reduce_heads=False,
    )


def importance_divergence(target: torch.Tensor, predicted: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """KL divergence of the predicted from the target importance, both made to sum to 1 over the prompt.

    Args:
        target, predicted: ``[batch, heads, length]``; minus infinity on padding.
        power: both are raised to it first. 1 is the paper's objective, in which the attention sink, most of the mass,
            is most of the loss; below 1 the many small entries count for more, above 1 the few large ones.

    Returns:
        The mean over batch and heads, in nats (LookaheadKV, arXiv 2603.10899, training objective).
    """
    target, predicted = _normalize(target, power), _normalize(predicted, power)
    return F.kl_div(predicted.clamp(min=1e-30).log(), target, reduction="none").sum(-1).mean()


def _normalize(scores: torch.Tensor, power: float) -> torch.Tensor:
    # The smallest normal number keeps the gradient of a root finite where a score underflowed.
    raised = scores.clamp(min=torch.finfo(scores.dtype).tiny).pow(power) if power != 1 else scores
    return F.normalize(raised.masked_fill(scores == -torch.inf, 0.0), p=1.0, dim=-1, eps=1e-30)


def mean_over_query_heads(scores: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[batch, kv_heads, length]`` from ``[batch, heads, length]``."""
    return scores.unflatten(1, (kv_heads, -1)).mean(2)


def importance_recall(target: torch.Tensor, predicted: torch.Tensor, kv_heads: int, budget: int) -> torch.Tensor:
    """Share of the target's ``budget`` most important entries of each KV head that the prediction ranks as high.

    Args:
        target, predicted: ``[batch, heads, length]``, with ``length`` above the budget.
        kv_heads: number of KV heads, over whose query heads scores are averaged.
        budget: entries kept per KV head.

    Returns:
        ``[batch]``, between 0 and 1.
    """
    kept = []
    for scores in (target, predicted):
        grouped = mean_over_query_heads(scores, kv_heads)
        best = grouped.topk(budget, dim=-1).indices
        kept.append(torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True))
    return (kept[0] & kept[1]).float().sum(-1).mean(1) / budget
