"""One layer from its weight and input moments to integers, scales and zero points: the stages put together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lkq_hf.quantization.descent import joint_descent
from lkq_hf.quantization.gptq import costliest_first_order, gptq, group_aware_order
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
    """

    weight: QuantizedWeight
    losses: dict[str, Tensor]
    energy: Tensor
    offsets: Tensor | None = None


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
    with full_float32():
        return _solve(weight, moments, settings)


def _solve(weight: Tensor, moments: InputMoments, settings: SolverSettings) -> Solution:
    if not bool(torch.isfinite(moments.hessian).all()):
        raise ValueError("the calibration inputs contain NaN or infinity; run the base model in bfloat16 or float32")
    # Every step minimizes the damped objective: calibration data is a sample, and what fits only it is lost elsewhere.
    hessian = damped(moments.hessian, settings.damp_percent)
    w = weight.detach().to(hessian.device, torch.float32)
    bits, sym = settings.bits, settings.sym
    group_size = resolve_group_size(w.shape[1], settings.group_size)
    if not bool(torch.isfinite(w).all()):
        raise ValueError("the weight contains NaN or infinity; the base checkpoint is damaged")
    if float(w.abs().max()) > LARGEST_SCALE:
        raise ValueError(f"weights beyond {LARGEST_SCALE:g} have no float16 scale; leave the layer out")

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
        deviation = moments.output_deviation(w) if settings.needs_deviation else None
        if deviation is not None:
            target = corrected_target(w, deviation, factor, order, settings.alpha)

    losses: dict[str, Tensor] = {}

    def record(step: str) -> None:
        error = target - reconstruct(integers, scales, zeros, group_size)
        losses[step] = ((error @ hessian) * error).sum(1)

    integers = nearest(w, scales, zeros, bits, group_size)
    record("nearest")
    if not settings.round_to_nearest and factor is not None:
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
        curvature = hessian.diagonal() * scales.repeat_interleave(group_size, 1)
        offsets = ((error @ hessian) / curvature).clamp(-1, 1).half()
    return Solution(quantized, losses, ((w @ hessian) * w).sum(1), offsets)


def corrected_target(weight: Tensor, deviation: Tensor, factor: Tensor, order: Tensor, alpha: float) -> Tensor:
    """`w + alpha D H^-1`, `[out, in]`: what a layer should compute on inputs that earlier layers already disturbed.

    `D = E[(Y - Y~) X~^T]`, `[out, in]`, with the outputs `Y` of the full-precision network and `Y~` of `w` on the
    disturbed inputs. For `alpha = 1` it is the least-squares answer to `Y` by a weight that sees `X~`; smaller values
    hold back the part that fits this calibration set only. `factor` is `U` with `H^-1 = U^T U`, in `order`.
    """
    target = weight.clone()
    target[:, order] += alpha * (deviation[:, order] @ factor.T @ factor)
    return target


def _column_order(hessian: Tensor, group_size: int, settings: SolverSettings) -> Tensor:
    if settings.column_order == "costliest_first":
        return costliest_first_order(_inverse_factor(hessian))
    if settings.column_order == "group_aware":
        return group_aware_order(hessian.diagonal(), group_size)
    return torch.arange(hessian.shape[0], device=hessian.device)


def _inverse_factor(hessian: Tensor, order: Tensor | None = None) -> Tensor:
    for damping in (0.0, *EXTRA_DAMPING):
        try:
            return inverse_factor(damped(hessian, damping) if damping else hessian, order)
        except torch.linalg.LinAlgError:
            continue
    raise ValueError(
        f"the input moments stay singular when damped by {EXTRA_DAMPING[-1]:g} of their mean; "
        "use more calibration tokens or a larger damp_percent"
    )
