"""A gate on hidden states beside learned tokens, for texts that are asked about later.

    python benchmarks/adapter_training.py --texts texts.jsonl.gz --out later --prompts-only --workers 8 --count 2500 \\
        --validation-count 64 --max-length 6144 --seed 5 --mix '{"length_skew": 0, "asked_later_share": 1.0}'
    python benchmarks/gate.py --targets later/targets --minutes 4 --out gate

The gate scores tokens by what each attention layer reads of them, and appends no tokens. It is trained on the
importance that the answers give to the prompt's entries (`importance_loss`) and, with ``--eviction-weight``, on what
the answers lose over the evicted cache, as adapters are. Then `AnswerJudge` compares it with the shipped adapter and
SnapKV on the same held-out prompts. Results go to ``OUT.json``, the gate to ``OUT.safetensors``.
"""

import argparse
import itertools
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from common import DEVICE, MODELS, describe, real_model, save, settings
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, set_seed

from lkq_hf import shipped_adapter
from lkq_hf.cache.modules import attention_modules
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.evaluation.judge import AnswerJudge
from lkq_hf.scoring import LookaheadScorer, PrefillAttention, Scorer, SnapKVScorer
from lkq_hf.training import TargetCollator
from lkq_hf.training.data import SeededLengthGroupedSampler
from lkq_hf.training.eviction import eviction_gates, response_divergence, response_logits
from lkq_hf.training.importance import (
    PromptCache,
    importance_divergence,
    mean_over_query_heads,
    read_response,
    response_importance,
)

ROW_POWER = 2.0
"""Of the mean over an answer's tokens and a KV head's query heads that makes attention an importance."""

WARM_UP = 0.05
"""Share of the training in which the learning rate rises."""

Hidden = dict[int, torch.Tensor]
"""What each attention layer has read, ``[batch, length, hidden]``."""


class Gate(nn.Module):
    """Log importance of a token's entries in one layer, from what the layer's attention reads of the token.

    Args:
        size: features of a token.
        width: of the layer between; 0 for a linear gate.
        kv_heads: heads to score.
        uses_entries: whether the heads' keys and values are features as well.
    """

    def __init__(self, size: int, width: int, kv_heads: int, uses_entries: bool = False) -> None:
        super().__init__()
        self.uses_entries = uses_entries
        self.inner = nn.Linear(size, width) if width else None
        self.outer = nn.Linear(width or size, kv_heads)
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Scores of ``[batch, length, hidden]``, with entries ``[batch, kv_heads, length, features]``.

        Returns:
            float32 ``[batch, kv_heads, length]``.
        """
        entries = [each.transpose(1, 2).flatten(2) for each in (key, value)] if self.uses_entries else []
        features = torch.cat([F.rms_norm(each, each.shape[-1:]) for each in (hidden, *entries)], -1)
        if self.inner is not None:
            # The wide product in the model's precision, the scores themselves in float32.
            weights = self.inner.weight.to(features), self.inner.bias.to(features)
            features = F.gelu(F.linear(features, *weights))
        return self.outer(features.float()).transpose(1, 2)


class Gates(nn.ModuleDict):
    """A `Gate` for each layer that is evicted."""

    @classmethod
    def of(cls, decoder: PreTrainedModel, width: int, uses_entries: bool) -> "Gates":
        """Untrained ones, for what the decoder's layers are found to hold."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=decoder.device)
        with reading_hidden(decoder) as hidden:
            prompt = PromptCache(decoder, ids)
        layers = response_importance(decoder, prompt, ids)
        gates = {}
        for layer in layers:
            entries = [prompt.layers[layer].keys, prompt.layers[layer].values]
            size = hidden[layer].shape[-1] + uses_entries * sum(each.shape[1] * each.shape[3] for each in entries)
            gates[str(layer)] = Gate(size, width, prompt.kv_heads(layer), uses_entries)
        return cls(gates).to(decoder.device)

    def scores(self, layer: int, *features: torch.Tensor) -> torch.Tensor:
        return self[str(layer)](*features)


@contextmanager
def reading_hidden(decoder: PreTrainedModel) -> Iterator[Hidden]:
    """What the attention layers read in the last forward inside."""
    hidden: Hidden = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    hooks = [each.register_forward_pre_hook(note, with_kwargs=True) for each in attention_modules(decoder)]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class GateScorer(Scorer):
    """Scores by gates. Serves prompts that are read in one forward inside of `reading_hidden`."""

    gates: Gates
    hidden: Hidden

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        length, layer = attention.length, attention.layer_index
        key, value = attention.key[:, :, :length], attention.value[:, :, :length]
        return self.gates.scores(layer, self.hidden[layer][:, :length], key, value).exp()


def importance_loss(target: torch.Tensor, scores: torch.Tensor, power: float, scale_weight: float) -> torch.Tensor:
    """How far log scores are from an importance, both ``[batch, heads, length]``.

    The divergence compares entries of a head. As heads compete for a budget, the sums over the heads' entries are
    compared too, by their logarithms.
    """
    divergence = importance_divergence(target, scores.exp(), power)
    sums = target.pow(power).sum(-1).log(), (power * scores).logsumexp(-1)
    return divergence + scale_weight * F.mse_loss(*sums) / power**2


class Training:
    """The loss of batches, and what changes while time passes."""

    def __init__(self, model: Any, gates: Gates, options: argparse.Namespace) -> None:
        self.model, self.decoder, self.gates, self.options = model, get_decoder(model), gates, options
        self.budgets = random.Random(options.seed)
        self.step, self.seconds = 0, 0.0

    @property
    def share(self) -> float:
        """Of the training that is done."""
        return min(max(self.seconds / (60 * self.options.minutes), self.step / self.options.max_steps), 1.0)

    def learning_rate(self) -> float:
        return self.options.learning_rate * min(self.share / WARM_UP, 1.0) * (1 + math.cos(math.pi * self.share)) / 2

    def losses(self, batch: dict[str, torch.Tensor], budget: int | None) -> list[torch.Tensor]:
        """The importance's loss and, for a budget, that of the answers over the evicted cache."""
        model, decoder = self.model, self.decoder
        response = batch["response_ids"], batch["response_mask"]
        with reading_hidden(decoder) as hidden:
            prompt = PromptCache(decoder, batch["input_ids"])
        if budget is None:
            found, full = response_importance(decoder, prompt, *response, ROW_POWER), None
        else:
            found, full = read_response(model, decoder, prompt, *response, ROW_POWER)
        scores, targets = {}, []
        for layer, importance in found.items():
            entries = prompt.layers[layer]
            scores[layer] = self.gates.scores(layer, hidden[layer], entries.keys, entries.values)
            targets.append(mean_over_query_heads(importance.pow(ROW_POWER), prompt.kv_heads(layer)))
        target = torch.cat(targets, 1).pow(1 / ROW_POWER).clamp(min=torch.finfo(torch.float32).tiny)
        every = torch.cat(list(scores.values()), 1)
        losses = [importance_loss(target, every, self.options.importance_power, self.options.scale_weight)]
        if full is not None:
            high, low = self.options.temperature
            temperature = high + (low - high) * min(self.share / 0.6, 1.0)
            kv_heads = {layer: each.shape[1] for layer, each in scores.items()}
            importance = {layer: each.exp() for layer, each in scores.items()}
            open_gates = eviction_gates(importance, kv_heads, budget, temperature)
            evicted = response_logits(model, decoder, prompt, *response, gates=open_gates)
            losses.append(response_divergence(full, evicted, response[1]))
        return losses

    def update(self, rows: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[float]:
        """One step; returns the losses."""
        options = self.options
        low, high = map(math.log, options.eviction_budgets)
        budget = round(math.exp(self.budgets.uniform(low, high))) if options.eviction_weight else None
        if self.share < options.importance_alone:
            budget = None
        total = torch.zeros(1 if budget is None else 2, device=options.device)
        for batch in batches(rows, options):
            losses = torch.stack(self.losses(batch, budget)) * (len(batch["input_ids"]) / len(rows))
            weights = torch.tensor([1.0, options.eviction_weight][: len(losses)], device=losses.device)
            (weights * losses).sum().backward()
            total += losses.detach()
        norm = nn.utils.clip_grad_norm_(self.gates.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = self.learning_rate()
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        return [*total.tolist(), float(norm)]

    @torch.no_grad()
    def held_out(self, rows: list[dict[str, Any]]) -> float:
        """The importance's loss."""
        parts = [(self.losses(batch, None)[0], len(batch["input_ids"])) for batch in batches(rows, self.options)]
        return sum(float(loss) * count for loss, count in parts) / len(rows)


def batches(rows: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Of prompts of one length: nothing is padded but answers, and the attention needs no mask."""
    by_length: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_length[len(row["input_ids"])].append(row)
    for length, same in by_length.items():
        size = max(1, options.batch_tokens // length)
        for start in range(0, len(same), size):
            batch = TargetCollator()(same[start : start + size])
            yield {name: tensor.to(options.device) for name, tensor in batch.items()}


def steps(rows: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Prompts of similar length for each step, without end."""
    sampler = SeededLengthGroupedSampler([len(row["input_ids"]) for row in rows], options.batch_size, options.seed)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), options.batch_size):
            yield [rows[index] for index in order[start : start + options.batch_size]]


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--targets", type=Path, required=True, help="what adapter_training.py --prompts-only made")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, or a directory")
    parser.add_argument(
        "--adapter", default="smollm2-135m-instruct-lookahead-later", help='to compare with, or "none"'
    )
    parser.add_argument("--width", type=int, default=128, help="of the layer between; 0 for a linear gate")
    parser.add_argument("--uses-entries", action="store_true", help="keys and values are features too")
    parser.add_argument("--importance-power", type=float, default=1.5)
    parser.add_argument("--scale-weight", type=float, default=0.1)
    parser.add_argument("--eviction-weight", type=float, default=0.5)
    parser.add_argument("--importance-alone", type=float, default=0.2, help="first share, without that objective")
    parser.add_argument("--eviction-budgets", type=int, nargs=2, default=[48, 640])
    parser.add_argument("--temperature", type=float, nargs=2, default=[0.25, 0.1], help="first and last")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, default=4, help="of training, without evaluations")
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=64, help="prompts in a step")
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="of the prompts that are read together")
    parser.add_argument("--evaluations", type=int, default=2, help="of the gate, until the end")
    parser.add_argument("--judge-prompts", type=int, default=64)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    set_seed(options.seed)
    train, held_out = (
        [row for row in Dataset.from_parquet(str(options.targets / name / "prompts.parquet")) if row["response_ids"]]
        for name in ("train", "validation")
    )
    held_out = held_out[: options.judge_prompts]
    adapter = None if options.adapter == "none" else shipped_adapter(options.adapter)
    model, _ = real_model(options.model, adapter, options.device)
    model.requires_grad_(False)
    decoder = get_decoder(model)
    gates = Gates.of(decoder, options.width, options.uses_entries)
    judge = AnswerJudge(held_out, options.budgets)
    training = Training(model, gates, options)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=0.0, weight_decay=0.0)
    results: dict[str, Any] = {
        "environment": describe(),
        "settings": settings(options),
        "losses": [],
        "evaluations": [],
    }
    results["parameters"] = sum(weight.numel() for weight in gates.parameters())

    def evaluate(others: dict[str, Scorer]) -> None:
        with reading_hidden(decoder) as hidden:
            found = judge.compare(model, {"gate": GateScorer(gates, hidden), **others})
        results["evaluations"].append({"step": training.step, "loss": training.held_out(held_out), **found})
        print(results["evaluations"][-1], flush=True)
        save(options.out, results)

    tokens: dict[str, Scorer] = {} if adapter is None else {"tokens": LookaheadScorer()}
    evaluate({**tokens, "SnapKV": SnapKVScorer()})
    for rows in steps(train, options):
        started, before = time.monotonic(), training.share
        losses = training.update(rows, optimizer)
        training.seconds += time.monotonic() - started
        results["losses"].append([round(loss, 5) for loss in losses])
        results["seconds"] = round(training.seconds, 1)
        print(training.step, results["seconds"], results["losses"][-1], flush=True)
        if int(before * options.evaluations) < int(training.share * options.evaluations):
            evaluate({})
        if training.share == 1:
            break
    if options.device != "cpu":
        results["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    save(options.out, results)
    save_file(gates.state_dict(), options.out.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
