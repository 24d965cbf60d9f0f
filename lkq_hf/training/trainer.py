"""Training a lookahead adapter."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from lkq_hf.adapter.layer import LookaheadTokens
from lkq_hf.cache.prefill import get_decoder
from lkq_hf.scoring.lookahead import ADAPTER_ATTRIBUTE
from lkq_hf.training.arguments import LookaheadTrainingArguments
from lkq_hf.training.data import TargetCollator
from lkq_hf.training.importance import (
    PromptCache,
    importance_divergence,
    importance_recall,
    lookahead_importance,
    mean_over_query_heads,
    response_importance,
)


class LookaheadTrainer(Trainer):
    """Trains the active ``LOOKAHEAD_KV`` adapter of a model to predict which prompt entries a response attends to.

    The base model is frozen and read without gradients; gradients flow through the lookahead tokens alone. Data sets
    hold ``"input_ids"`` (a prompt) and ``"response_ids"`` (the model's own answer), as made by
    :func:`~lkq_hf.training.generate_targets`. The evaluation reports the loss and, for each of
    ``args.recall_budgets``, the share of the response's most important entries that the adapter finds.

    Args:
        model: a model with an active adapter, such as ``get_peft_model(model, LookaheadKVConfig())``.
        args: :class:`LookaheadTrainingArguments`.
        kwargs: as for ``transformers.Trainer``.

    Raises:
        ValueError: the model has no active adapter.

    Source: LookaheadKV (arXiv 2603.10899).
    """

    args: LookaheadTrainingArguments
    # The loss is a mean over the batch.
    loss_is_scaled_for_ga = False

    def __init__(self, model: nn.Module, args: LookaheadTrainingArguments, **kwargs: Any) -> None:
        self._tokens(model).active_tokens()
        kwargs.setdefault(
            "data_collator",
            TargetCollator(
                max_prompt_length=args.max_prompt_length,
                max_response_length=args.max_response_length,
            ),
        )
        # Adapter weights are float32 whatever the base is: a step of Adam is lost in the rounding of bfloat16.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        super().__init__(model=model, args=args, **kwargs)
        # The recipe's loss does not come from the model's forward, which therefore must not be given its arguments.
        self.model_accepts_loss_kwargs = False
        self._recalls: dict[int, list[torch.Tensor]] = {}

    @staticmethod
    def _tokens(model: nn.Module) -> LookaheadTokens:
        tokens = getattr(get_decoder(model), ADAPTER_ATTRIBUTE, None)
        if tokens is None:
            raise ValueError(
                "LookaheadTrainer needs a model with a LOOKAHEAD_KV adapter: "
                "model = peft.get_peft_model(model, LookaheadKVConfig())"
            )
        return tokens

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, scores = self._loss_and_scores(model, inputs)
        return (loss, scores) if return_outputs else loss

    def _loss_and_scores(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        unwrapped = self.accelerator.unwrap_model(model)
        decoder = get_decoder(unwrapped)
        prompt = PromptCache(decoder, inputs["input_ids"], inputs["attention_mask"])
        tokens = self._tokens(unwrapped)
        row_power = tokens.row_power()
        response = inputs["response_ids"], inputs["response_mask"]
        targets = response_importance(decoder, prompt, *response, row_power)
        predicted = lookahead_importance(model, decoder, prompt, tokens.active_tokens(), row_power)
        if self.args.importance_heads == "kv":
            kv_heads = decoder.config.num_key_value_heads
            targets, predicted = (
                {layer: mean_over_query_heads(scores, kv_heads) for layer, scores in importance.items()}
                for importance in (targets, predicted)
            )
        power = self.args.importance_power
        losses = [
            importance_divergence(targets[layer], predicted[layer], power).to(self.args.device) for layer in targets
        ]
        return torch.stack(losses).mean(), (targets, predicted)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            loss, (targets, predicted) = self._loss_and_scores(model, self._prepare_inputs(inputs))
            kv_heads = get_decoder(self.accelerator.unwrap_model(model)).config.num_key_value_heads
            for budget in self.args.recall_budgets:
                recalls = [
                    importance_recall(targets[layer], predicted[layer], kv_heads, budget)
                    for layer in targets
                    if targets[layer].shape[-1] > budget
                ]
                if recalls:
                    self._recalls.setdefault(budget, []).append(torch.stack(recalls).mean(0))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._recalls = {}
        output = super().evaluation_loop(*args, **kwargs)
        prefix, metrics = kwargs.get("metric_key_prefix", "eval"), dict(output.metrics or {})
        for budget, recalls in self._recalls.items():
            gathered = self.accelerator.gather_for_metrics(torch.cat(recalls))
            metrics[f"{prefix}_recall@{budget}"] = gathered.mean().item()
        return output._replace(metrics=metrics)
