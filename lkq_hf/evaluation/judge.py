"""What held-out answers lose over an evicted cache: the number by which the checkpoint of an adapter is chosen."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lkq_hf.evaluation.decoding import Answers, score_answers
from lkq_hf.evaluation.prefill import Cell, read_prompts
from lkq_hf.scoring import LookaheadScorer, Scorer
from lkq_hf.training import TargetCollator

LEAST_EVICTED = 2
"""A prompt counts for budgets of which it is at least this many times as long."""


class AnswerJudge:
    """Compares an adapter's evicted caches with the full one on answers that the full one gave.

    ``lost@B`` is what an answer's tokens lose in log-likelihood at a budget of B entries, in nats: the mean over
    prompts of the mean over an answer's tokens, so that short answers, which state a fact, count as much as long
    ones. ``same@B`` is the share of answers whose every token is the evicted cache's own choice as well. ``lost`` and
    ``same`` are their means over the budgets.

    Args:
        targets: prompts that the adapter is not trained on, with the model's answers (``"input_ids"`` and
            ``"response_ids"``).
        budgets: entries per KV head.
        allocation: how they are shared out among heads, as in `LookaheadCache`.
        batch_tokens: tokens of the prompts that are read together; prompts of one length share a batch.
        scorer: what chooses the entries.
    """

    def __init__(
        self,
        targets: Iterable[Mapping[str, Any]],
        budgets: Sequence[int] = (64, 128, 256),
        allocation: str = "global",
        batch_tokens: int = 16_384,
        scorer: Scorer | None = None,
    ) -> None:
        self.budgets = sorted(set(budgets))
        self.allocation = allocation
        self.scorer = scorer or LookaheadScorer()
        by_length: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in targets:
            if len(row["input_ids"]) >= LEAST_EVICTED * self.budgets[0]:
                by_length[len(row["input_ids"])].append(dict(row))
        self._batches = []
        for length, rows in sorted(by_length.items()):
            size = max(1, batch_tokens // length)
            self._batches += [TargetCollator()(rows[start : start + size]) for start in range(0, len(rows), size)]

    def __bool__(self) -> bool:
        """Whether any prompt is long enough for any budget."""
        return bool(self._batches)

    def __call__(self, model: Any) -> dict[str, float]:
        """Judges a model with an active adapter, prepared for eviction.

        Returns:
            The numbers by name; empty if no prompt is long enough for any budget.
        """
        return self.compare(model, {"": self.scorer})[""]

    @torch.no_grad()
    def compare(self, model: Any, scorers: Mapping[str, Scorer]) -> dict[str, dict[str, float]]:
        """Judges several scorers on one reading of each prompt.

        Args:
            model: prepared for eviction.
            scorers: by name, as in `read_prompts`.

        Returns:
            For each scorer its numbers by name.
        """
        device = next(model.parameters()).device
        lost: dict[Cell, list[torch.Tensor]] = defaultdict(list)
        same: dict[Cell, list[torch.Tensor]] = defaultdict(list)
        for batch in self._batches:
            ids = batch["input_ids"].to(device)
            budgets = [budget for budget in self.budgets if LEAST_EVICTED * budget <= ids.shape[1]]
            answers = Answers(batch["response_ids"].to(device), batch["response_mask"].to(device))
            mask = torch.ones_like(ids)
            prefill = read_prompts(model, ids, mask, scorers, budgets, self.allocation)
            full, _ = score_answers(model, prefill.logits, mask, prefill.full, answers)
            for cell, cache in prefill.caches.items():
                nll, chosen = score_answers(model, prefill.logits, mask, cache, answers)
                lost[cell].append((((nll - full) * answers.mask).sum(-1) / answers.mask.sum(-1)).cpu())
                same[cell].append(((chosen == answers.ids) | ~answers.mask).all(-1).float().cpu())
        return {name: _by_budget("lost", name, lost) | _by_budget("same", name, same) for name in scorers}


def _by_budget(what: str, scorer: str, found: Mapping[Cell, list[torch.Tensor]]) -> dict[str, float]:
    """Means over prompts at each budget, and their mean."""
    means = {
        f"{what}@{budget}": float(torch.cat(parts).mean())
        for (name, budget), parts in sorted(found.items())
        if name == scorer
    }
    return {what: sum(means.values()) / len(means), **means} if means else {}
