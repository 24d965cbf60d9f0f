"""A bit width for each layer under a mean or a size: the choice, given what every width costs and loses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Unit:
    """Layers of a block that share their input, such as query, key and value: all of them get one width.

    Other engines fuse such layers, and our kernels multiply with them at once, which needs a common format.

    Args:
        layers: their names inside the list of blocks, such as `0.mlp.down_proj`.
        weights: how many weights they have.
        sizes: bytes of their packed tensors, by width.
        losses: by width, what it adds to the divergence of the model's predictions, in nats per token; from where it
            is counted does not matter.
    """

    layers: tuple[str, ...]
    weights: int
    sizes: dict[int, int]
    losses: dict[int, float]

    def at_least(self, bits: int) -> "Unit":
        """This unit without widths below `bits`."""
        return replace(self, losses={width: loss for width, loss in self.losses.items() if width >= bits})


def choose_widths(units: Sequence[Unit], costs: Sequence[dict[int, float]], budget: float) -> list[int]:
    """Widths with a small sum of losses among those whose costs stay within a budget.

    Every unit begins with the smallest width. Then steps to larger ones are taken, those first that save most loss
    for what they cost; only widths on the lower convex hull of a unit's losses over its costs are steps. Without the
    last few steps, which may not fit, this is the minimum of `loss + lambda * cost` for some `lambda`.

    Args:
        units: what gets a width each.
        costs: of each unit, by width; the same widths as its losses, and more for larger ones.
        budget: for the sum of costs.

    Raises:
        ValueError: the smallest widths cost more than the budget.
    """
    chosen = [min(unit.losses) for unit in units]
    spent = sum(cost[width] for cost, width in zip(costs, chosen, strict=True))
    if spent > budget:
        raise ValueError(f"the smallest widths cost {spent:g}, more than the budget of {budget:g}")
    steps = [
        (gain, index, width)
        for index, (unit, cost) in enumerate(zip(units, costs, strict=True))
        for gain, width in _steps(unit.losses, cost)
    ]
    stopped: set[int] = set()
    for _, index, width in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        more = costs[index][width] - costs[index][chosen[index]]
        if index in stopped or spent + more > budget:
            stopped.add(index)
            continue
        chosen[index] = width
        spent += more
    return chosen


def _steps(losses: dict[int, float], costs: dict[int, float]) -> list[tuple[float, int]]:
    """The widths on the lower convex hull but the smallest, and what each saves for its cost; less and less."""
    steps: list[tuple[float, int]] = []
    at = min(losses)
    while True:
        larger = [((losses[at] - losses[width]) / (costs[width] - costs[at]), width) for width in losses if width > at]
        gain, width = max(larger, default=(0.0, at))
        if gain <= 0:
            return steps
        steps.append((gain, width))
        at = width
