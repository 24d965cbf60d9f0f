"""Where the budget goes on average: the ``budget_profile`` of an adapter's config."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lkq_hf.adapter import LookaheadKVConfig
from lkq_hf.adapter.layer import LookaheadTokens
from lkq_hf.cache.allocation import MOST
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.cache.profile import check_profile
from lkq_hf.evaluation.prefill import read_prompts
from lkq_hf.files import read_json, write_atomically
from lkq_hf.formats import PEFT_TYPE
from lkq_hf.scoring import LookaheadScorer

BUDGETS = (64, 128, 256, 512, 1024)


@torch.no_grad()
def measure_profile(
    model: Any, prompts: Sequence[Sequence[int]], budgets: Iterable[int] = BUDGETS, progress: bool = True
) -> dict[str, list[list[float]]] | None:
    """Means of what ``allocation="global"`` keeps of held-out prompts, as shares of the budget.

    A prompt counts for budgets up to a quarter of its length: in a shorter one, heads cannot differ as much as they
    want to.

    Args:
        model: a causal language model with an active LOOKAHEAD_KV adapter.
        prompts: their token ids.
        budgets: entries per KV head.
        progress: whether to show a bar.

    Returns:
        budget -> ``[evicted layers][kv_heads]``; budgets for which no prompt is long enough are left out. None if that
        leaves none.
    """
    totals: dict[int, list[torch.Tensor]] = {}
    counts: dict[int, int] = {}
    device = next(model.parameters()).device
    for prompt in tqdm(prompts, desc="profile", unit="prompt", disable=not progress):
        fitting = [budget for budget in sorted(set(budgets)) if MOST * budget <= len(prompt)]
        if not fitting:
            continue
        ids = torch.tensor([list(prompt)], device=device)
        prefill = read_prompts(model, ids, torch.ones_like(ids), {"lookahead": LookaheadScorer()}, fitting)
        for (_, budget), cache in prefill.caches.items():
            kept = [cache.layers[index].prefix.lengths[0].double().cpu() for index in cache.evicted_layers()]
            before = totals.get(budget)
            totals[budget] = kept if before is None else [a + b for a, b in zip(before, kept, strict=True)]
            counts[budget] = counts.get(budget, 0) + 1
    profile = {
        str(budget): [[round(share, 4) for share in (layer / counts[budget] / budget).tolist()] for layer in layers]
        for budget, layers in sorted(totals.items())
    }
    return profile or None


def set_profile(model: nn.Module, profile: dict[str, list[list[float]]] | None) -> None:
    """Puts a profile into the config of the model's active LOOKAHEAD_KV adapter, which is saved with it.

    Raises:
        ValueError: the profile has values out of range.
    """
    tokens: LookaheadTokens = get_decoder(model).lookahead  # type: ignore[assignment]
    name = tokens.active_name()
    config: LookaheadKVConfig = model.peft_config[name]  # type: ignore[index, assignment]
    config.budget_profile = profile
    config.__post_init__()
    tokens.set_budget_profile(name, config)


def write_profile(directory: Path, profile: dict[str, list[list[float]]] | None) -> None:
    """Puts a profile into the adapter_config.json of a saved adapter; the file is written whole or not at all.

    Raises:
        ValueError: the profile has values out of range, or the directory holds another kind of adapter.
        FileNotFoundError: the directory holds no adapter.
    """
    check_profile(profile)
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} should be a directory with an adapter; found no {path.name} in it")
    config = read_json(path)
    if config.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{path} should be that of a {PEFT_TYPE} adapter; found one of type {config.get('peft_type')}"
        )
    text = json.dumps(config | {"budget_profile": profile}, indent=2, sort_keys=True)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
