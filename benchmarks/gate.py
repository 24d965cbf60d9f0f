"""A gate beside learned tokens, for texts that are asked about later.

    python benchmarks/adapter_training.py --texts texts.jsonl.gz --out later --prompts-only --workers 8 --count 2500 \\
        --validation-count 64 --max-length 6144 --seed 5 --mix '{"length_skew": 0, "asked_later_share": 1.0}'
    python benchmarks/gate.py --targets later/targets --minutes 3 --out gate

The gate scores tokens by what each attention layer reads of them, and appends no tokens; with ``--features entry`` it
sees an entry's key and value alone. With ``--times-adapter`` its scores multiply those of the adapter, which stays as
it is. It is trained on the importance that answers give to the entries of a prompt and, as adapters are, on what the
answers lose over the evicted cache. `AnswerJudge` compares it with the adapter and with SnapKV on the same held-out
prompts. Results go to ``OUT.json``, the gate to ``OUT.safetensors``.
"""

import argparse
import itertools
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from common import DEVICE, MODELS, describe, real_model, save, settings
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from lkq_hf import shipped_adapter
from lkq_hf.cache.modules import attention_modules
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.evaluation.judge import AnswerJudge
from lkq_hf.scoring import LookaheadScorer, PrefillAttention, Scorer, SnapKVScorer
from lkq_hf.scoring.lookahead import ADAPTER_ATTRIBUTE
from lkq_hf.scoring.pooling import pool_scores
from lkq_hf.training import TargetCollator, importance
from lkq_hf.training.data import SeededLengthGroupedSampler
from lkq_hf.training.eviction import eviction_gates, response_divergence, response_logits

ROW_POWER = 2.0
"""Of the mean over an answer's tokens and a KV head's query heads that makes attention an importance."""

LEAST = 1e-7
"""Smaller importance counts as this much."""

Rows = list[dict[str, Any]]
Hidden = dict[int, torch.Tensor]
"""What each attention layer has read, ``[batch, length, hidden]``."""


class Gate(nn.Module):
    """Log importance of tokens' entries in one layer, from what the layer's attention reads of the tokens.

    Args:
        size: of the features of a token.
        width: of the layer between.
        kv_heads: heads to score.
        uses_entries: whether the heads' keys and values are features too.
    """

    def __init__(self, size: int, width: int, kv_heads: int, uses_entries: bool = True) -> None:
        super().__init__()
        self.uses_entries = uses_entries
        self.inner, self.outer = nn.Linear(size, width), nn.Linear(width, kv_heads)
        nn.init.zeros_(self.outer.weight)

    @property
    def bias(self) -> nn.Parameter:
        """Of each head's scores."""
        return self.outer.bias

    def forward(self, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Float32 ``[batch, kv_heads, length]`` of ``[batch, length, hidden]`` and the entries of the same tokens."""
        entries = [each.transpose(1, 2).flatten(2) for each in (key, value)] if self.uses_entries else []
        features = torch.cat([F.rms_norm(each, each.shape[-1:]) for each in (hidden, *entries)], -1)
        # The wide product in the model's precision; scores in float32, because small differences decide.
        between = F.linear(features, self.inner.weight.to(features), self.inner.bias.to(features))
        return self.outer(F.gelu(between).float()).transpose(1, 2)


class EntryGate(nn.Module):
    """Log importance of entries in one layer, from nothing but the entry: its head's key and value of that token.

    So it can score an entry at any time, also where heads hold different tokens.

    Args:
        size: of a key and a value together.
        width: of the layer between.
        kv_heads: heads to score.
    """

    def __init__(self, size: int, width: int, kv_heads: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(kv_heads, size, width) / math.sqrt(3 * size))
        self.inner_bias = nn.Parameter(torch.zeros(kv_heads, 1, width))
        self.outer = nn.Parameter(torch.zeros(kv_heads, width, 1))
        self.bias = nn.Parameter(torch.zeros(kv_heads))

    def forward(self, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As `Gate`'s; the hidden states are not looked at."""
        features = torch.cat([F.rms_norm(each, each.shape[-1:]) for each in (key, value)], -1)
        between = features @ self.inner.to(features) + self.inner_bias.to(features)
        return (F.gelu(between).float() @ self.outer).squeeze(-1) + self.bias[:, None]


@contextmanager
def reading_hidden(decoder: nn.Module) -> Iterator[Hidden]:
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
    """Scores by a gate for each layer. Serves prompts that one forward reads inside of `reading_hidden`."""

    gates: nn.ModuleDict
    hidden: Hidden

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        length, layer = attention.length, attention.layer_index
        entries = attention.key[:, :, :length], attention.value[:, :, :length]
        return self.gates[str(layer)](self.hidden[layer][:, :length], *entries).exp()


@dataclass(frozen=True)
class GatedLookaheadScorer(LookaheadScorer):
    """The scores of an adapter times those of a gate."""

    gate: GateScorer = field(kw_only=True)

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        return super().score(attention) * self.gate.score(attention)


def of_kv_heads(
    found: dict[int, torch.Tensor], prompt: importance.PromptCache, power: float
) -> dict[int, torch.Tensor]:
    """``[batch, kv_heads, length]`` of each layer's ``[batch, heads, length]``: power means over query heads."""
    return {
        layer: importance.mean_over_query_heads(each**power, prompt.kv_heads(layer)) ** (1 / power)
        for layer, each in found.items()
    }


@torch.no_grad()
def adapter_scores(model: Any, prompt: importance.PromptCache) -> dict[int, torch.Tensor]:
    """By layer, the logarithms of what a `LookaheadScorer` gives: ``[batch, kv_heads, length]``."""
    decoder = get_decoder(model)
    tokens: Any = getattr(decoder, ADAPTER_ATTRIBUTE)
    power = tokens.row_power()
    found = importance.lookahead_importance(model, decoder, prompt, tokens.active_tokens(), power)
    least = torch.finfo(torch.float32).tiny
    return {
        layer: pool_scores(scores, **tokens.pooling()).clamp(min=least).log()
        for layer, scores in of_kv_heads(found, prompt, power).items()
    }


def read(model: Any, batch: dict[str, torch.Tensor], with_logits: bool = False) -> tuple[Any, ...]:
    """Reads prompts and, without gradients, their answers.

    Returns:
        Hidden states; the prompts' cache; for each layer the importance of entries, ``[batch, kv_heads, length]``; the
        answers' logits, or None.
    """
    decoder, response = get_decoder(model), (batch["response_ids"], batch["response_mask"])
    with reading_hidden(decoder) as hidden:
        prompt = importance.PromptCache(decoder, batch["input_ids"])
    if with_logits:
        found, logits = importance.read_response(model, decoder, prompt, *response, ROW_POWER)
    else:
        found, logits = importance.response_importance(decoder, prompt, *response, ROW_POWER), None
    return hidden, prompt, of_kv_heads(found, prompt, ROW_POWER), logits


def untrained_gates(model: Any, batch: dict[str, torch.Tensor], options: argparse.Namespace) -> nn.ModuleDict:
    """One for each layer that is evicted: all tokens have the importance of the average, or what the adapter gives."""
    hidden, prompt, target, _ = read(model, batch)
    gates = nn.ModuleDict()
    for layer, found in target.items():
        key, value, kv_heads = prompt.layers[layer].keys, prompt.layers[layer].values, prompt.kv_heads(layer)
        of_entry = key.shape[-1] + value.shape[-1]
        gate: Gate | EntryGate
        if options.features == "entry":
            gate = EntryGate(of_entry, options.width, kv_heads)
        else:
            uses_entries = options.features == "both"
            size = hidden[layer].shape[-1] + kv_heads * of_entry * uses_entries
            gate = Gate(size, options.width, kv_heads, uses_entries)
        if not options.times_adapter:
            gate.bias.data.copy_(found.clamp(min=LEAST).log().mean((0, 2)))
        gates[str(layer)] = gate
    return gates.to(model.device)


def losses(
    model: Any,
    gates: nn.ModuleDict,
    batch: dict[str, torch.Tensor],
    options: argparse.Namespace,
    budget: int | None = None,
    temperature: float = 0.1,
) -> torch.Tensor:
    """The losses of some prompts of one length, in nats.

    The first is the divergence of each head's importance, to which few entries matter, and not its sum. The second is
    the squared error of the logarithms, to which all matter alike: so scores of all heads compare. With a budget, the
    third is what the answers lose over the evicted cache.
    """
    hidden, prompt, found, full = read(model, batch, with_logits=budget is not None)
    layers = {index: prompt.layers[index] for index in found}
    scores = {index: gates[str(index)](hidden[index], layer.keys, layer.values) for index, layer in layers.items()}
    if options.times_adapter:
        before = adapter_scores(model, prompt)
        scores = {index: each + before[index] for index, each in scores.items()}
    target, predicted = (torch.cat(list(each.values()), 1) for each in (found, scores))
    parts = [
        importance.importance_divergence(target, predicted.exp(), options.importance_power),
        F.mse_loss(predicted, target.clamp(min=LEAST).log()),
    ]
    if budget is not None:
        heads = {index: each.shape[1] for index, each in scores.items()}
        kept = eviction_gates({index: each.exp() for index, each in scores.items()}, heads, budget, temperature)
        response = batch["response_ids"], batch["response_mask"]
        evicted = response_logits(model, get_decoder(model), prompt, *response, gates=kept)
        parts.append(response_divergence(full, evicted, response[1]))
    return torch.stack(parts)


def batches(rows: Rows, options: argparse.Namespace) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """Prompts of one length, so that no attention needs a mask, and what share of all they are."""
    by_length: dict[int, Rows] = defaultdict(list)
    for row in rows:
        by_length[len(row["input_ids"])].append(row)
    for length, same in by_length.items():
        size = max(1, options.batch_tokens // length)
        for start in range(0, len(same), size):
            batch = TargetCollator()(same[start : start + size])
            share = len(batch["input_ids"]) / len(rows)
            yield share, {name: tensor.to(options.device) for name, tensor in batch.items()}


def steps(rows: Rows, options: argparse.Namespace) -> Iterator[Rows]:
    """Prompts of similar length, without end."""
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
    parser.add_argument("--adapter", default="smollm2-135m-instruct-lookahead-later", help='or a directory, or "none"')
    parser.add_argument("--width", type=int, default=128, help="of the layer between")
    parser.add_argument(
        "--features",
        default="both",
        choices=["both", "hidden", "entry"],
        help="hidden states, keys and values of all heads; hidden states; or for each head its own key and value",
    )
    parser.add_argument("--times-adapter", action="store_true", help="multiply the adapter's scores")
    parser.add_argument("--importance-power", type=float, default=1.5)
    parser.add_argument("--logarithm-weight", type=float, default=0.1, help="of the second loss")
    parser.add_argument("--eviction-weight", type=float, default=0.5, help="of the third loss")
    parser.add_argument("--eviction-from", type=float, default=0.1, help="share of the training before that loss")
    parser.add_argument("--eviction-budgets", type=int, nargs=2, default=[48, 640])
    parser.add_argument("--temperature", type=float, nargs=2, default=[0.25, 0.1], help="first and last")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--minutes", type=float, default=3, help="of training, without evaluations")
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=64, help="prompts in a step")
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="of the prompts that are read together")
    parser.add_argument("--evaluations", type=int, default=2)
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
    compared: dict[str, Scorer] = {"SnapKV": SnapKVScorer()}
    adapter = None
    if options.adapter != "none":
        adapter = options.adapter if Path(options.adapter).is_dir() else shipped_adapter(options.adapter)
        compared["tokens"] = LookaheadScorer()
    model, _ = real_model(options.model, adapter, options.device)
    model.requires_grad_(False)
    gates = untrained_gates(model, next(batches(train[: options.batch_size], options))[1], options)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=0.0, weight_decay=0.0)
    judge = AnswerJudge(held_out, options.budgets)
    results: dict[str, Any] = {
        "environment": describe(),
        "settings": settings(options) | {"adapter": Path(options.adapter).name},
        "evaluations": [],
    }
    results |= {"parameters": sum(weight.numel() for weight in gates.parameters()), "seconds": 0.0, "losses": []}

    def evaluate(scorers: dict[str, Scorer]) -> None:
        with torch.no_grad(), reading_hidden(get_decoder(model)) as hidden:
            gate = GateScorer(gates, hidden)
            scorer = GatedLookaheadScorer(gate=gate) if options.times_adapter else gate
            judged = judge.compare(model, {"gate": scorer, **scorers})
            parts = sum(share * losses(model, gates, batch, options) for share, batch in batches(held_out, options))
        results["evaluations"].append({"step": len(results["losses"]), "losses": parts.tolist(), **judged})
        print(results["evaluations"][-1], flush=True)
        save(options.out, results)

    evaluate(compared)
    weights = torch.tensor([1.0, options.logarithm_weight, options.eviction_weight], device=options.device)
    (least, most), (warm, cold) = map(math.log, options.eviction_budgets), options.temperature
    draw, done = random.Random(options.seed), 0.0
    for rows in steps(train, options):
        started, budget = time.monotonic(), round(math.exp(draw.uniform(least, most)))
        late = options.eviction_weight > 0 and done >= options.eviction_from
        temperature = warm + (cold - warm) * min(done / 0.6, 1.0)
        optimizer.param_groups[0]["lr"] = options.learning_rate * (1 + math.cos(math.pi * done)) / 2
        total = 0.0
        for share, batch in batches(rows, options):
            parts = share * losses(model, gates, batch, options, budget if late else None, temperature)
            (weights[: len(parts)] * parts).sum().backward()
            total += parts.detach()
        nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        results["losses"].append([round(loss, 4) for loss in total.tolist()])
        results["seconds"] += time.monotonic() - started
        before = done
        done = min(max(results["seconds"] / options.minutes / 60, len(results["losses"]) / options.max_steps), 1.0)
        print(f"{done:.3f}", results["losses"][-1], flush=True)
        if int(done * options.evaluations) > int(before * options.evaluations):
            evaluate({})
        if done == 1:
            break
    if options.device != "cpu":
        results["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    save(options.out, results)
    save_file(gates.state_dict(), options.out.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
