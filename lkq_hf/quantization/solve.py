"""Layers from their weights and input moments to integers, scales and zero points: the stages put together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lkq_hf.quantization.descent import joint_descent
from lkq_hf.quantization.gptq import costliest_first_order, gptq, group_aware_order, reordered
from lkq_hf.quantization.grid import LARGEST_SCALE, SCALE_DTYPE, minmax_grid, nearest, reconstruct
from lkq_hf.quantization.hessian import InputMoments, damped, inverse_factor
from lkq_hf.quantization.precision import full_float32
from lkq_hf.quantization.refinement import BlockRefinement, EndToEnd
from lkq_hf.quantization.stage1 import search_scales
from lkq_hf.quantization.stage2 import refine_scales
from lkq_hf.quantization.weight import QuantizedWeight

# Tried one after another where the factorization fails: float32 moments of nearly collinear inputs need it.
EXTRA_DAMPING = (0.01, 0.1, 1.0)


@dataclass(frozen=True, kw_only=True)
class SolverSwitches:
    """The switches of the solver, for ablations. The defaults are the strongest method measured.

    Args:
        stages: what is done besides GPTQ, any of `"stage1"` (scales searched by their effect on the output),
            `"stage2"` (scales refined after GPTQ) and `"descent"` (integers and scales refined together after GPTQ).
            `()` is plain GPTQ.
        damp_percent: damping of the Hessian, as a part of its mean diagonal. Every step minimizes the damped
            objective, which keeps it from fitting what is particular to the calibration data.
        column_order: the order in which GPTQ rounds columns: `"stored"`, `"group_aware"` (important inputs first, one
            group after another) or `"costliest_first"` (first the columns whose error the others can make up for
            least). The scales are fixed before, so every order gives the same format.
        corrected_target: GPTQ aims at `w + alpha w R H^-1` instead of `w` (GPTAQ, arXiv 2504.02692).
        corrected_residual: a layer whose output is added to the residual stream also answers for what earlier layers
            have changed there: the deviation is that of the sum, not of the layer's input. Nothing changes where an
            output is normalized before it is added (Gemma 3).
        alpha: weight of the deviation `R` between full-precision and quantized inputs; 0 to 1.
        sweeps: passes of stage 2 and of the descent.
        scale_search: scales where stage 1 is off: `"minmax"`, or `"mse"` for the range of least squared weight error.
        round_to_nearest: no GPTQ: each weight goes to the nearest grid point.
    """

    stages: tuple[str, ...] = ("stage1", "descent")
    damp_percent: float = 0.1
    column_order: str = "costliest_first"
    corrected_target: bool = True
    corrected_residual: bool = True
    alpha: float = 0.25
    sweeps: int = 8
    scale_search: str = "minmax"
    round_to_nearest: bool = False


@dataclass(frozen=True, kw_only=True)
class SolverSettings(SolverSwitches):
    """How one layer is quantized: the switches, and what `TwoStageGPTQConfig` says besides."""

    bits: int
    group_size: int
    sym: bool
    refinement: BlockRefinement | None = None
    end_to_end: EndToEnd | None = None
    layer_bits: Mapping[str, int] = field(default_factory=dict)

    def bits_of(self, layer: str) -> int:
        """The bits per weight of a layer, by its name inside the list of blocks, such as `0.mlp.down_proj`."""
        return self.layer_bits.get(layer, self.bits)

    def of(self, layer: str) -> "SolverSettings":
        """The settings of one layer, by its name inside the list of blocks."""
        return replace(self, bits=self.bits_of(layer), layer_bits={})

    @property
    def needs_deviation(self) -> bool:
        """Whether any step uses a deviation (`InputMoments`)."""
        return self.alpha != 0 and (self.corrected_target or "stage2" in self.stages or "descent" in self.stages)

    @property
    def needs_full_path(self) -> bool:
        """Whether the full-precision hidden states travel along."""
        return self.needs_deviation or self.refinement is not None or self.end_to_end is not None


@dataclass(frozen=True)
class Solution:
    """A quantized weight and its error per row after each step, in the order in which the steps ran.

    `losses[step]` is `(t - w^) H (t - w^)^T` with the damped `H`, float32 `[out]`, and `energy` is `w H w^T`, to
    read it against. `offsets` are where the objective is least in each weight with all others fixed, from its integer
    and in grid steps, float16 `[out, in]`; only for a block that is refined later.

    For weights that are solved together, all tensors have a leading batch dimension.
    """

    weight: QuantizedWeight
    losses: dict[str, Tensor]
    energy: Tensor
    offsets: Tensor | None = None

    def unbind(self) -> list["Solution"]:
        """The solutions of weights that were solved together, one by one."""
        weight = self.weight
        return [
            Solution(
                replace(weight, integers=weight.integers[i], scales=weight.scales[i], zeros=weight.zeros[i]),
                {step: loss[i] for step, loss in self.losses.items()},
                energy,
                None if self.offsets is None else self.offsets[i],
            )
            for i, energy in enumerate(self.energy)
        ]


class CannotBeQuantized(ValueError):
    """What is wrong with a weight or its moments.

    Args:
        index: the weight's place among those that are solved together.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


def resolve_group_size(in_features: int, group_size: int) -> int:
    """The group size as a positive number: -1 means the whole row.

    Raises:
        ValueError: no whole number of groups fits.
    """
    if group_size == -1:
        return in_features
    if in_features % group_size:
        fitting = [size for size in (32, 64, 128) if in_features % size == 0]
        raise ValueError(
            f"in_features={in_features} is not a multiple of group_size={group_size}; group sizes that fit: "
            f"{', '.join(map(str, [*fitting, -1]))} (-1: one group a row)."
        )
    return group_size


def quantize_weight(weight: Tensor, moments: InputMoments, settings: SolverSettings) -> Solution:
    """Quantizes one weight, `[out, in]` of any float dtype, on the device of `moments`.

    Rows are independent, so layers that share their input can be solved as one weight with their rows concatenated.

    Raises:
        ValueError: non-finite weights or moments, a group size that does not fit, scales beyond float16, or a Hessian
            that stays singular however much it is damped.
    """
    return quantize_weights([weight], [moments], settings).unbind()[0]


def quantize_weights(weights: Sequence[Tensor], moments: Sequence[InputMoments], settings: SolverSettings) -> Solution:
    """Quantizes weights of the same shape together, each with its own moments, as `quantize_weight` does.

    Many small ones take little longer than one, as each step is one operation for all of them.

    Returns:
        A solution with a leading batch dimension.

    Raises:
        CannotBeQuantized: as `quantize_weight`, with the place of the first weight that cannot be quantized.
    """
    group_size = resolve_group_size(weights[0].shape[1], settings.group_size)
    _check(weights, moments)
    with full_float32():
        return _solve(weights, moments, settings, group_size)


def _check(weights: Sequence[Tensor], moments: Sequence[InputMoments]) -> None:
    """Refuses weights and moments that are not finite, and weights beyond the range of scales."""
    largest_weights = _largest(weights)
    for index, largest in enumerate(_largest([each.hessian for each in moments])):
        if not math.isfinite(largest):
            raise CannotBeQuantized(
                "the calibration inputs contain NaN or infinity; run the base model in bfloat16 or float32", index
            )
        if not math.isfinite(largest_weights[index]):
            raise CannotBeQuantized("the weight contains NaN or infinity; the base checkpoint is damaged", index)
        if largest_weights[index] > LARGEST_SCALE:
            raise CannotBeQuantized(
                f"weights beyond {LARGEST_SCALE:g} have no float16 scale; leave the layer out", index
            )


def _largest(tensors: Sequence[Tensor]) -> list[float]:
    """The largest magnitude of each, or NaN."""
    return torch.stack([torch.linalg.vector_norm(each.detach(), torch.inf) for each in tensors]).tolist()


def _solve(
    weights: Sequence[Tensor], moments: Sequence[InputMoments], settings: SolverSettings, group_size: int
) -> Solution:
    # Every step minimizes the damped objective: calibration data is a sample, and what fits only it is lost elsewhere.
    hessian = damped(_stacked([each.hessian for each in moments]), settings.damp_percent)
    w = _stacked([weight.detach().to(hessian.device, torch.float32) for weight in weights])
    bits, sym = settings.bits, settings.sym

    if "stage1" in settings.stages:
        scales, zeros = search_scales(w, bits, group_size, sym, hessian)
    elif settings.scale_search == "mse":
        scales, zeros = search_scales(w, bits, group_size, sym)
    else:
        scales, zeros = minmax_grid(w, bits, group_size, sym)

    order, factor = None, None
    target = w
    if not settings.round_to_nearest or settings.needs_deviation:
        order = _column_order(hessian, group_size, settings)
        factor = _inverse_factor(hessian, order)
        deviation = _deviation(w, moments) if settings.needs_deviation else None
        if deviation is not None:
            target = corrected_target(w, deviation, factor, order, settings.alpha)

    losses: dict[str, Tensor] = {}

    def record(step: str) -> None:
        error = target - reconstruct(integers, scales, zeros, group_size)
        losses[step] = ((error @ hessian) * error).sum(2)

    integers = nearest(w, scales, zeros, bits, group_size)
    record("nearest")
    if not settings.round_to_nearest and factor is not None and order is not None:
        goal = target if settings.corrected_target else w
        integers = gptq(goal, factor, scales, zeros, bits, group_size, order)
        record("gptq")
    if "stage2" in settings.stages:
        scales = refine_scales(target, hessian, integers, scales, zeros, group_size, settings.sweeps)
        record("stage2")
    if "descent" in settings.stages:
        integers, scales = joint_descent(
            target, hessian, integers, scales, zeros, bits, group_size, sweeps=settings.sweeps
        )
        record("descent")
    quantized = QuantizedWeight(
        integers=integers.to(torch.int32),
        scales=scales.to(SCALE_DTYPE),
        zeros=zeros.to(torch.int32),
        bits=bits,
        group_size=group_size,
        sym=sym,
    )
    offsets = None
    if settings.refinement is not None:
        error = target - reconstruct(integers, scales, zeros, group_size)
        curvature = hessian.diagonal(dim1=1, dim2=2).unsqueeze(1) * scales.repeat_interleave(group_size, 2)
        offsets = ((error @ hessian) / curvature).clamp(-1, 1).half()
    return Solution(quantized, losses, ((w @ hessian) * w).sum(2), offsets)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one, contiguous and with a leading batch dimension; without a copy if there is one alone."""
    return tensors[0].contiguous().unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _deviation(weight: Tensor, moments: Sequence[InputMoments]) -> Tensor | None:
    """The deviations of outputs, `[batch, out, in]`: zero for weights that have none beside ones that do."""
    each = [moment.output_deviation(one) for one, moment in zip(weight, moments, strict=True)]
    if all(deviation is None for deviation in each):
        return None
    return _stacked([torch.zeros_like(weight[0]) if deviation is None else deviation for deviation in each])


def corrected_target(weight: Tensor, deviation: Tensor, factor: Tensor, order: Tensor, alpha: float) -> Tensor:
    """`w + alpha D H^-1`, `[batch, out, in]`: what a layer should compute on inputs that earlier ones disturbed.

    `D = E[(Y - Y~) X~^T]`, `[batch, out, in]`, with the outputs `Y` of the full-precision network and `Y~` of `w` on
    the disturbed inputs. For `alpha = 1` it is the least-squares answer to `Y` by a weight that sees `X~`; smaller
    values hold back the part that fits this calibration set only. `factor` is `U` with `H^-1 = U^T U`, in `order`.
    """
    correction = reordered(deviation, order) @ factor.mT @ factor
    return weight.add(reordered(correction, order.argsort(1)), alpha=alpha)


def _column_order(hessian: Tensor, group_size: int, settings: SolverSettings) -> Tensor:
    if settings.column_order == "costliest_first":
        return costliest_first_order(_inverse_factor(hessian))
    if settings.column_order == "group_aware":
        return group_aware_order(hessian.diagonal(dim1=1, dim2=2), group_size)
    return torch.arange(hessian.shape[1], device=hessian.device).repeat(len(hessian), 1)


def _inverse_factor(hessian: Tensor, order: Tensor | None = None) -> Tensor:
    """`inverse_factor`, of singular ones with extra damping."""
    factor = inverse_factor(hessian, order)
    for damping in EXTRA_DAMPING:
        if not (singular := _singular(factor)):
            return factor
        again = damped(hessian[singular], damping)
        factor[singular] = inverse_factor(again, None if order is None else order[singular])
    if singular := _singular(factor):
        raise CannotBeQuantized(
            f"the input moments stay singular when damped by {EXTRA_DAMPING[-1]:g} of their mean; "
            "use more calibration tokens or a larger damp_percent",
            singular[0],
        )
    return factor


def _singular(factor: Tensor) -> list[int]:
    """The places of the moments that `inverse_factor` could not factorize."""
    return factor[:, 0, 0].isnan().nonzero().flatten().tolist()
