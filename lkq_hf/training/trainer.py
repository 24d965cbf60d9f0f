"""Training a lookahead adapter."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import has_length

from lkq_hf.adapter.layer import LookaheadKVLayer, LookaheadTokens
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.cache.static import MASKED_ATTENTION
from lkq_hf.scoring.lookahead import ADAPTER_ATTRIBUTE
from lkq_hf.training.arguments import LookaheadTrainingArguments
from lkq_hf.training.checkpoints import last_complete_checkpoint
from lkq_hf.training.data import SeededLengthGroupedSampler, TargetCollator
from lkq_hf.training.eviction import eviction_gates, response_divergence, response_logits
from lkq_hf.training.importance import (
    PromptCache,
    importance_divergence,
    importance_recall,
    lookahead_importance,
    mean_over_query_heads,
    read_response,
    response_importance,
)


class _EpochOfSampler(TrainerCallback):
    """Tells a sampler the epoch, also where it lies behind the wrappers with which accelerate resumes an epoch."""

    def __init__(self, sampler: SeededLengthGroupedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class _EvaluationsAreSaved(TrainerCallback):
    """Saves what was evaluated and evaluates the last step, so that the best of all evaluated steps can be chosen."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        control.should_save = True


Judge = Callable[[nn.Module], Mapping[str, float]]


class LookaheadTrainer(Trainer):
    """Trains the active ``LOOKAHEAD_KV`` adapter of a model to predict which prompt entries a response attends to.

    The base model is frozen and read without gradients; gradients flow through the lookahead tokens alone. Data sets
    hold ``"input_ids"`` (a prompt) and ``"response_ids"`` (the model's own answer), as made by
    `generate_targets`. The evaluation reports the loss and, for each of
    ``args.recall_budgets``, the share of the response's most important entries that the adapter finds in prompts
    longer than the budget.

    Several processes (``accelerate launch``) take the steps that one would take with the same number of prompts in a
    step. Under FSDP2 (``examples/accelerate/fsdp2.yaml``) the base model is sharded and the adapter replicated, so
    checkpoints hold the adapter alone and can be resumed with or without FSDP, on any number of processes.

    Args:
        model: a model with an active adapter, such as ``get_peft_model(model, LookaheadKVConfig())``.
        args: `LookaheadTrainingArguments`.
        judge: called with the model in every evaluation; returns metrics by name that are added to the evaluation's
            (`AnswerJudge`). With ``args.metric_for_best_model`` one of them chooses
            the checkpoint. Each process calls it with the same prompts.
        kwargs: as for ``transformers.Trainer``.

    Raises:
        ValueError: the model has no active adapter, FSDP is set up in a way that cannot leave it out, or the model's
            attention takes no masks and ``args.eviction_weight`` is not 0.

    Source: LookaheadKV (arXiv 2603.10899).
    """

    args: LookaheadTrainingArguments
    # The loss is a mean over the batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self, model: nn.Module, args: LookaheadTrainingArguments, judge: Judge | None = None, **kwargs: Any
    ) -> None:
        self._judge = judge
        decoder = get_decoder(model)
        self._tokens(decoder).active_tokens()
        implementation = decoder.config._attn_implementation
        if args.eviction_weight and implementation not in MASKED_ATTENTION:
            raise ValueError(
                f"eviction_weight needs an attention that takes masks, {' or '.join(MASKED_ATTENTION)}, found "
                f'{implementation}: call model.set_attn_implementation("sdpa"), or leave eviction_weight at 0'
            )
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
        self._recalls: list[torch.Tensor] = []
        if args.metric_for_best_model is not None and args.save_strategy != "no":
            self.add_callback(_EvaluationsAreSaved())
        if self.is_fsdp_enabled:
            self._keep_adapter_out_of_fsdp()
        self._broadcast_adapter()

    @staticmethod
    def _tokens(decoder: nn.Module) -> LookaheadTokens:
        tokens = getattr(decoder, ADAPTER_ATTRIBUTE, None)
        if tokens is None:
            raise ValueError(
                "LookaheadTrainer needs a model with a LOOKAHEAD_KV adapter: "
                "model = peft.get_peft_model(model, LookaheadKVConfig())"
            )
        return tokens

    def _keep_adapter_out_of_fsdp(self) -> None:
        """The tokens are read outside of any forward, and float32 weights cannot share a group with bfloat16 ones."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "a lookahead adapter is trained with FSDP2, and with every process loading the base model: set "
                f"fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false (found {plugin.fsdp_version} and "
                f"{plugin.cpu_ram_efficient_loading}), as examples/accelerate/fsdp2.yaml does"
            )
        plugin.ignored_modules = [
            getattr(module, name)
            for module in self._whole_model().modules()
            if isinstance(module, LookaheadKVLayer)
            for name in module.adapter_layer_names
        ]
        for module in plugin.ignored_modules:
            module.to(self.accelerator.device)

    def _adapter_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._whole_model().parameters() if parameter.requires_grad]

    def _whole_model(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def _broadcast_adapter(self) -> None:
        """Every process starts from the first one's adapter: DDP sees to that, FSDP to nothing that it ignores."""
        for parameter in self._adapter_parameters():
            value = broadcast(parameter.data.to(self.accelerator.device))
            parameter.data.copy_(value)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``transformers.Trainer.train``; True resumes from the last checkpoint that was written to its end.

        Raises:
            FileNotFoundError: True, and there is no such checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(cast(str, self.args.output_dir))
            if resume_from_checkpoint is None:
                raise FileNotFoundError(
                    f"{self.args.output_dir} holds no complete checkpoint; leave resume_from_checkpoint out to begin"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            gradients = [p.grad for p in self._adapter_parameters() if p.grad is not None]
            mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        return loss

    @contextmanager
    def checkpoints_of_the_adapter(self) -> Iterator[None]:
        """Saves and loads as without FSDP: what is trained is whole in every process."""
        enabled, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        # Reading a state, as the first process will, puts gathered weights away: all have to, or the next forward's
        # gathers do not match.
        for module in self._whole_model().modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        try:
            yield
        finally:
            self.is_fsdp_enabled = enabled

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self.checkpoints_of_the_adapter():
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with self.checkpoints_of_the_adapter():
            super()._save_optimizer_and_scheduler(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.checkpoints_of_the_adapter():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with self.checkpoints_of_the_adapter():
            super()._load_optimizer_and_scheduler(*args, **kwargs)

    def load_best(self) -> int:
        """Puts the weights of the best checkpoint, by ``args.metric_for_best_model``, into the adapter.

        Returns:
            The step that they are of; the last one where no checkpoint is known to be better.
        """
        best = self.state.best_model_checkpoint
        if best is None or self.state.best_global_step == self.state.global_step:
            return self.state.global_step
        with self.checkpoints_of_the_adapter():
            self._load_best_model()
        return self.state.best_global_step or 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        sampler = SeededLengthGroupedSampler(
            [len(row["input_ids"]) for row in cast(Any, dataset)], step_size, args.seed
        )
        self.add_callback(_EpochOfSampler(sampler))
        return sampler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, scores = self._loss_and_scores(model, inputs)
        return (loss, scores) if return_outputs else loss

    def _loss_and_scores(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        # Found once: the search looks at every module.
        decoder = get_decoder(self.accelerator.unwrap_model(model))
        # All three forwards go through the wrapper, which may have to gather the weights first (FSDP, ZeRO-3).
        prompt = PromptCache(decoder, inputs["input_ids"], inputs["attention_mask"], model)
        tokens = self._tokens(decoder)
        row_power = tokens.row_power()
        response = inputs["response_ids"], inputs["response_mask"]
        full_logits = None
        if self.args.eviction_weight and torch.is_grad_enabled():
            targets, full_logits = read_response(model, decoder, prompt, *response, row_power)
        else:
            targets = response_importance(decoder, prompt, *response, row_power, model)
        predicted = lookahead_importance(
            model, decoder, prompt, tokens.active_tokens(), row_power, tokens.active_rows(), self.args.recompute
        )
        kv_heads = {layer: prompt.kv_heads(layer) for layer in targets}
        if self.args.importance_heads == "kv":
            targets, predicted = (
                {layer: mean_over_query_heads(scores, kv_heads[layer]) for layer, scores in importance.items()}
                for importance in (targets, predicted)
            )
        # All layers' heads in one tensor: the mean over them is the same, and a step is bound by the number of its
        # operations.
        every_target, every_predicted = (
            torch.cat([scores.to(self.args.device) for scores in importance.values()], dim=1)
            for importance in (targets, predicted)
        )
        loss = importance_divergence(every_target, every_predicted, self.args.importance_power)
        if full_logits is not None:
            eviction_loss = self._eviction_loss(model, decoder, prompt, predicted, response, full_logits)
            loss = loss + self.args.eviction_weight * eviction_loss
        return loss, (targets, predicted, kv_heads)

    def _eviction_loss(
        self,
        model: nn.Module,
        decoder: PreTrainedModel,
        prompt: PromptCache,
        predicted: dict[int, torch.Tensor],
        response: tuple[torch.Tensor, torch.Tensor],
        full_logits: torch.Tensor,
    ) -> torch.Tensor:
        tokens = self._tokens(decoder)
        # Prompts that are shorter than the budget keep their gates open.
        gates = eviction_gates(
            predicted,
            {layer: prompt.kv_heads(layer) for layer in predicted},
            self._draw_budget(),
            self.args.eviction_temperature,
            tokens.row_power(),
            self.args.eviction_allocation,
            tokens.pooling(),
        )
        evicted = response_logits(model, decoder, prompt, *response, gates=gates, recompute=self.args.recompute)
        return response_divergence(full_logits, evicted, response[1]).to(self.args.device)

    def _draw_budget(self) -> int:
        """The same in all processes, and again the same when a run is resumed."""
        low, high = map(math.log, self.args.eviction_budgets)
        drawn = random.Random(f"{self.args.seed}/{self.state.global_step}").uniform(low, high)
        return round(math.exp(drawn))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            inputs = self._prepare_inputs(inputs)
            loss, (targets, predicted, kv_heads) = self._loss_and_scores(model, inputs)
            lengths = inputs["attention_mask"].sum(-1)
            recalls = torch.full((len(lengths), len(self.args.recall_budgets)), torch.nan, device=lengths.device)
            for column, budget in enumerate(self.args.recall_budgets):
                if bool((long := lengths > budget).any()):
                    found = [
                        importance_recall(targets[layer], predicted[layer], kv_heads[layer], budget).to(lengths.device)
                        for layer in targets
                    ]
                    recalls[long, column] = torch.stack(found).mean(0)[long]
        # Of the same shape in every process, and without the rows that fill up the last batch.
        self._recalls.append(self.accelerator.gather_for_metrics(recalls))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._recalls = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix, metrics = kwargs.get("metric_key_prefix", "eval"), dict(output.metrics or {})
        means = torch.cat(self._recalls).nanmean(0).tolist() if self._recalls else []
        for budget, mean in zip(self.args.recall_budgets, means, strict=False):
            if not math.isnan(mean):
                metrics[f"{prefix}_recall@{budget}"] = mean
        if self._judge is not None:
            judged = self._judge(self._whole_model().eval())
            metrics |= {f"{prefix}_{name}": value for name, value in judged.items()}
        return output._replace(metrics=metrics)
