"""Numbers of entries per head that are fixed before a prompt is read."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lkq_hf.cache.allocation import MOST

MAX_BUDGETS = 64
MAX_BUDGET = 2**31 - 1
MAX_HEADS = 65536
"""Over all layers."""


@dataclass(frozen=True)
class BudgetProfile:
    """What each KV head keeps, as a share of the mean, for a few budgets.

    Attributes:
        shares: for each budget, in rising order, float64 ``[heads]`` over all evicted layers; the mean is 1.
        heads: KV heads of each evicted layer.
    """

    shares: Mapping[int, torch.Tensor]
    heads: tuple[int, ...]

    @classmethod
    def from_config(cls, profile: Mapping[str, Sequence[Sequence[float]]]) -> "BudgetProfile":
        """From ``LookaheadKVConfig.budget_profile``: budget -> ``[evicted layers][kv_heads]``."""
        shares = {
            int(budget): torch.tensor([share for row in rows for share in row], dtype=torch.float64)
            for budget, rows in profile.items()
        }
        return cls(dict(sorted(shares.items())), tuple(map(len, next(iter(profile.values())))))

    def numbers(self, budget: int, length: int) -> list[torch.Tensor]:
        """Entries that each head keeps of a text of ``length`` tokens.

        Shares are interpolated linearly in the logarithm of the budget, and are those of the nearest budget outside
        of the known ones. Every head keeps at least one entry and at most ``length``; what one head cannot hold goes
        to the others. The sum is exactly ``budget`` times the number of heads.

        Args:
            budget: mean number of entries per KV head, at most ``length``.
            length: tokens of the text.

        Returns:
            For each evicted layer int64 ``[kv_heads]``.
        """
        wanted = self._interpolated(budget)
        total = budget * wanted.numel()
        # The largest scale whose sum is not above the total; 1 entry for each head is never too many.
        low, high = 0.0, length / float(wanted.min())
        for _ in range(100):
            middle = (low + high) / 2
            if (wanted * middle).clamp(1, length).sum() <= total:
                low = middle
            else:
                high = middle
        exact = (wanted * low).clamp(1, length)
        numbers = exact.floor().long()
        # The largest remainders are rounded up; among equal ones, the earlier.
        rest = total - int(numbers.sum())
        order = (exact - numbers).masked_fill(numbers == length, -1.0).argsort(descending=True, stable=True)
        numbers[order[:rest]] += 1
        return list(numbers.split(self.heads))

    def _interpolated(self, budget: int) -> torch.Tensor:
        known = list(self.shares)
        place = bisect_left(known, budget)
        if place == 0 or place == len(known):
            return self.shares[known[min(place, len(known) - 1)]]
        below, above = known[place - 1], known[place]
        weight = math.log(budget / below) / math.log(above / below)
        return torch.lerp(self.shares[below], self.shares[above], weight)


def check_profile(profile: Any) -> None:
    """Checks a ``LookaheadKVConfig.budget_profile``, which may come from strangers.

    Raises:
        ValueError: it is not None and not a mapping of budgets to positive shares of the mean for each KV head of each
            layer, all of one shape.
    """
    if profile is None:
        return
    expected = f"budget_profile must map 1 to {MAX_BUDGETS} budgets to [layers][kv_heads] shares of the mean"
    if not isinstance(profile, dict) or not 1 <= len(profile) <= MAX_BUDGETS:
        raise ValueError(f"{expected}, got {_shown(profile)}")
    shapes = set()
    for budget, rows in profile.items():
        if not isinstance(budget, str) or not _is_budget(budget):
            raise ValueError(f"{expected}, each budget a whole number such as '128', got {_shown(budget)}")
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            raise ValueError(f"{expected}, got {_shown(rows)} for a budget of {budget}")
        shares = [share for row in rows for share in row]
        if len(shares) > MAX_HEADS or not all(map(_is_share, shares)):
            raise ValueError(f"{expected}, each above 0 and at most {MOST}; a budget of {budget} has others")
        mean = sum(shares) / len(shares)
        if abs(mean - 1) > 0.01:
            raise ValueError(f"{expected}, whose mean is 1; that of a budget of {budget} is {mean:.3f}")
        shapes.add(tuple(map(len, rows)))
    if len(shapes) > 1:
        raise ValueError(f"{expected}, as many for each budget; found {len(shapes)} different shapes")


def _is_budget(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10 and 1 <= int(text) <= MAX_BUDGET


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
