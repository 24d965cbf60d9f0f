"""Quantizing the experts of one layer, each on the tokens that it computes."""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lkq_hf.quantization.expert_inputs import ExpertInputs, Tokens
from lkq_hf.quantization.experts import expert_weights, intermediate, projections
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.shrinkage import common_share, mixture
from lkq_hf.quantization.solve import CannotBeQuantized, Solution, SolverSettings, quantize_weights
from lkq_hf.quantization.weight import QuantizedWeight

logger = logging.getLogger(__name__)

# Tokens through which an expert meets the layer's common input, for each feature of its down projection: enough that
# these moments are not singular.
SAMPLE = 4

# Bytes that the experts which are solved together may take, roughly.
TOGETHER = 1 << 32


@dataclass(frozen=True)
class ExpertCounts:
    """On how many tokens the experts of one layer were calibrated.

    `tokens` is the number of the layer's tokens, each of which goes to several of its `experts`. `unseen` experts
    computed no token, so they are calibrated on the layer's common input alone. For `rare` ones, which computed fewer
    tokens than they have input features, the common input counts for more than their own tokens.
    """

    tokens: int
    experts: int
    unseen: int
    rare: int
    fewest_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def quantize_experts(
    experts: nn.Module,
    twin: nn.Module | None,
    inputs: ExpertInputs,
    prefix: str,
    settings: SolverSettings,
    processes: Processes,
) -> tuple[dict[str, list[Solution]], ExpertCounts]:
    """Quantizes experts, as many together as `TOGETHER` allows; afterwards they compute with the quantized weights.

    One alone would leave a GPU nearly idle: its steps are small, and each waits for the one before.

    Both projections of an expert are calibrated on a mixture of its own tokens and the layer's common input
    (`shrinkage.common_share`). What the down projection receives of either follows from them, through the expert's
    own, already quantized, first projection.

    Args:
        experts: the module, on the compute device.
        twin: the same in full precision, for deviations.
        inputs: of both.
        prefix: the module's name and a dot, for messages.

    Returns:
        For each projection one solution an expert, and the counts.

    Raises:
        ValueError: weights or inputs that are not finite.
    """
    first, last = projections(experts)
    device = inputs.device
    deviation = settings.needs_deviation and twin is not None
    solutions: dict[str, list[Solution]] = {first: [], last: []}
    weights = {name: expert_weights(experts, name) for name in solutions}
    in_features = {name: weights[name][0].shape[1] for name in solutions}

    def moments_of(projection: str, chunk: range, parts: Iterable[tuple[int, Tokens]]) -> list[InputMoments]:
        moments = {expert: InputMoments(in_features[projection], device, deviation) for expert in chunk}
        for expert, (x, full, weight) in parts:
            if full is None:
                moments[expert].deviation = None
            moments[expert].add(x, full, weights=weight)
        for each in moments.values():
            processes.reduce(each)
        return list(moments.values())

    def passed(expert: int, part: Tokens) -> tuple[int, Tokens]:
        x, full, weight = part
        if full is not None:
            full = intermediate(twin, expert, full)
        return expert, (intermediate(experts, expert, x), full, weight)

    def solve(projection: str, chunk: range, moments: list[InputMoments]) -> None:
        dense = [weights[projection][expert] for expert in chunk]

        def quantize(part: slice) -> Solution:
            try:
                return quantize_weights(dense[part], moments[part], settings)
            except CannotBeQuantized as error:
                raise ValueError(f"{prefix}{projection}[{chunk[part][error.index]}]: {error}") from error

        solution = processes.solve(len(chunk), quantize)
        for weight, own in zip(dense, solution.unbind(), strict=True):
            weight.copy_(own.weight.dequantize())
            solutions[projection].append(_compact(own))

    (common,) = moments_of(first, range(1), ((0, part) for part in inputs.all_tokens()))
    sample = list(inputs.sample(max(1, common.tokens // (SAMPLE * in_features[last]))))
    tokens: list[int] = []
    for chunk in _chunks(len(weights[first]), [weight[0].shape for weight in weights.values()]):
        own = moments_of(first, chunk, inputs.of_experts(chunk))
        shares = [common_share(each.tokens, in_features[first]) for each in own]
        tokens.extend(each.tokens for each in own)
        solve(first, chunk, [mixture(each, common, share) for each, share in zip(own, shares, strict=True)])
        own = moments_of(last, chunk, (passed(*each) for each in inputs.of_experts(chunk)))
        others = moments_of(last, chunk, (passed(expert, part) for expert in chunk for part in sample))
        solve(last, chunk, [mixture(*each) for each in zip(own, others, shares, strict=True)])
    counts = ExpertCounts(
        tokens=common.tokens,
        experts=len(tokens),
        unseen=tokens.count(0),
        rare=sum(count < in_features[first] for count in tokens),
        fewest_tokens=min(tokens),
    )
    if counts.rare:
        logger.warning(
            "%s: %d of %d experts are calibrated on the layer's common input more than on their own tokens (%d have "
            "none); more calibration tokens would help",
            prefix.removesuffix("."),
            counts.rare,
            counts.experts,
            counts.unseen,
        )
    return solutions, counts


def _chunks(experts: int, shapes: Iterable[torch.Size]) -> list[range]:
    """The experts, divided into those that are solved together, whose weights have these `shapes`."""
    # Squares: moments and their mixture, the Hessian, its factor, and what is made on the way. Weights: the target,
    # integers, errors and residuals, and copies in the order of columns.
    largest = max(4 * (10 * columns * columns + 8 * rows * columns) for rows, columns in shapes)
    size = max(1, TOGETHER // largest)
    return [range(start, min(start + size, experts)) for start in range(0, experts, size)]


def _compact(solution: Solution) -> Solution:
    """A solution that takes a quarter of the memory: all of a layer's are kept until its block is done."""
    weight = solution.weight
    small = QuantizedWeight(
        weight.integers.to(torch.uint8), weight.scales, weight.zeros, weight.bits, weight.group_size, weight.sym
    )
    return Solution(small, {step: _total(loss) for step, loss in solution.losses.items()}, _total(solution.energy))


def _total(rows: Tensor) -> Tensor:
    return rows.sum().unsqueeze(0)
