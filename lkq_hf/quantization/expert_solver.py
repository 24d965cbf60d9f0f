"""Quantizing the experts of one layer, each on the tokens that it computes."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lkq_hf.quantization.expert_inputs import ExpertInputs, Tokens
from lkq_hf.quantization.experts import expert_weights, intermediate, projections
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.shrinkage import common_share, mixture
from lkq_hf.quantization.solve import Solution, SolverSettings, quantize_weight
from lkq_hf.quantization.weight import QuantizedWeight

logger = logging.getLogger(__name__)

# Tokens through which an expert meets the layer's common input, for each feature of its down projection: enough that
# these moments are not singular.
SAMPLE = 4


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
    """Quantizes one expert after another; afterwards `experts` compute with the quantized weights.

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

    def moments_of(projection: str, *parts: Tokens) -> InputMoments:
        moments = InputMoments(in_features[projection], device, deviation)
        for x, full, weight in parts:
            if full is None:
                moments.deviation = None
            moments.add(x, full, weights=weight)
        processes.reduce(moments)
        return moments

    def passed(part: Tokens) -> Tokens:
        x, full, weight = part
        if full is not None:
            full = intermediate(twin, expert, full)
        return intermediate(experts, expert, x), full, weight

    def solve(projection: str, moments: InputMoments) -> None:
        weight = weights[projection][expert]
        name = f"{prefix}{projection}[{expert}]"
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: the weight contains NaN or infinity; the base checkpoint is damaged")
        rows = weight.float()
        try:
            solution = processes.solve(len(rows), lambda part: quantize_weight(rows[part], moments, settings))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        weight.copy_(solution.weight.dequantize())
        solutions[projection].append(_compact(solution))

    common = moments_of(first, *inputs.all_tokens())
    sample = list(inputs.sample(max(1, common.tokens // (SAMPLE * in_features[last]))))
    tokens = []
    for expert in range(len(weights[first])):
        own = moments_of(first, *inputs.of_expert(expert))
        share = common_share(own.tokens, in_features[first])
        solve(first, mixture(own, common, share))
        down = moments_of(last, *map(passed, inputs.of_expert(expert)))
        solve(last, mixture(down, moments_of(last, *map(passed, sample)), share))
        tokens.append(own.tokens)
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


def _compact(solution: Solution) -> Solution:
    """A solution that takes a quarter of the memory: all of a layer's are kept until its block is done."""
    weight = solution.weight
    small = QuantizedWeight(
        weight.integers.to(torch.uint8), weight.scales, weight.zeros, weight.bits, weight.group_size, weight.sym
    )
    return Solution(small, {step: _total(loss) for step, loss in solution.losses.items()}, _total(solution.energy))


def _total(rows: Tensor) -> Tensor:
    return rows.sum().unsqueeze(0)
