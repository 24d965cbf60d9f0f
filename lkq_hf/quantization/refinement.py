"""What gradient steps change in a quantized model, and how far."""

from dataclasses import dataclass, replace
from typing import Self

OPTIMIZERS = ("adam", "sign")
ROUNDINGS = ("vertex", "straight_through")
# Calibration tokens for which the defaults are made: 128 windows of 2,048.
TOKENS = 128 * 2048


@dataclass(frozen=True)
class GradientSteps:
    """How scales, zero points and roundings are changed by gradient.

    A rate is the way that all steps together can take: their length falls linearly from twice the mean to 0.

    Args:
        steps: gradient steps, one batch of calibration windows each.
        optimizer: `"adam"`, or `"sign"` for the gradient's sign alone.
        rounding: `"straight_through"` moves a weight's position along the gradient as the optimizer does, which drives
            it to the middle of two integers, where it goes to and fro. `"vertex"` moves it to where the loss is least
            with all other weights fixed, a Newton step from its integer by the curvature of the loss, so that an
            integer changes only if that lowers the loss.
        offset_rate: of the roundings; 0 keeps the integers. In grid steps with `"straight_through"`; with `"vertex"`
            the part of the way to the vertex of one batch that the first step goes.
        damping: with `"vertex"`, the part by which the curvature is raised: all weights move at once, and each would
            otherwise correct what others correct as well.
        scale_rate: of the logarithms of the scales; 0 keeps the scales.
        zero_rate: of the zero points, in grid steps; 0 keeps them, and symmetric weights always do.
        offset_bound: how far a weight's position may move from its integer, in grid steps.
        mixed_precision: float32 models are multiplied in bfloat16 on a GPU, and their logits in TF32.
        seed: of the order of batches.
    """

    steps: int = 200
    optimizer: str = "adam"
    rounding: str = "vertex"
    offset_rate: float = 0.1
    damping: float = 0.0
    scale_rate: float = 0.05
    zero_rate: float = 0.0
    offset_bound: float = 1.0
    mixed_precision: bool = True
    seed: int = 0

    def with_tokens(self, tokens: int) -> Self:
        """These settings for so many calibration tokens, if they are fewer than `TOKENS`.

        The fewer there are, the sooner steps follow what is peculiar to them: their number falls with its root.
        """
        return replace(self, steps=round(self.steps * _part(tokens)))

    def scale_rate_at(self, bits: int) -> float:
        """`scale_rate` for weights of so many bits."""
        return self.scale_rate


@dataclass(frozen=True)
class BlockRefinement(GradientSteps):
    """How each block is refined after its layers are solved.

    Args:
        start_from_vertex: a weight's position starts where its layer's objective is least with the others fixed, so
            that weights near the middle of two integers flip first; otherwise it starts at its integer.
        target_mix: 1 aims at the full-precision block on full-precision inputs, 0 at the full-precision block on the
            quantized path's inputs, and what lies between at the mean of both with these weights.
        token_power: each token's squared error is divided by this power of its target's mean square; 0 weighs all
            tokens alike, 1 weighs relative errors.
        fisher_share: how much of the error is weighed by what the model's output loses (`output_fisher`) and not by
            its square; 0 needs no pass through the whole model.
        fisher_windows: calibration windows from which that is measured.
    """

    start_from_vertex: bool = True
    target_mix: float = 1.0
    token_power: float = 0.0
    fisher_share: float = 0.0
    fisher_windows: int = 16

    def with_tokens(self, tokens: int) -> Self:
        """The rates fall with the steps: of little text, one batch alone tells less of where a weight should go."""
        part = _part(tokens)
        return replace(
            super().with_tokens(tokens),
            offset_rate=self.offset_rate * part,
            scale_rate=self.scale_rate * part,
            zero_rate=self.zero_rate * part,
        )


@dataclass(frozen=True)
class EndToEnd(GradientSteps):
    """How the scales of the whole model are tuned to the full-precision model's logits, after its last block.

    Integers stay: how a single weight moves the logits is lost in what differs from batch to batch, and integers that
    followed their gradients made a real model useless.

    `scale_rate` holds for up to 3 bits and halves with each further bit: what a scale moves grows with the largest
    integer.

    Raises:
        ValueError: an `offset_rate`.
    """

    steps: int = 100
    offset_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.offset_rate:
            raise ValueError(f"end-to-end tuning keeps the integers: expected offset_rate=0, found {self.offset_rate}")

    def scale_rate_at(self, bits: int) -> float:
        return self.scale_rate * 2.0 ** min(0, 3 - bits)


def _part(tokens: int) -> float:
    return min(1.0, (tokens / TOKENS) ** 0.5)
