"""How a block is refined."""

from dataclasses import dataclass

OPTIMIZERS = ("adam", "sign")


@dataclass(frozen=True)
class RefinementSettings:
    """How a block is refined after its layers are solved.

    Args:
        steps: gradient steps a block.
        optimizer: `"adam"`, or `"sign"` for steps of one length along the gradient's sign. Rates fall linearly to 0.
        offset_rate: of the roundings, in grid steps: what a weight may travel in all steps of full length. 0 keeps
            the integers.
        scale_rate: of the logarithms of the scales, likewise. 0 keeps the scales.
        zero_rate: of the zero points, in grid steps, likewise. 0 keeps them; symmetric weights always do.
        offset_bound: how far from its integer a weight's position may move, in grid steps.
        start_from_vertex: a weight's position starts where its layer's objective is least with the others fixed, so
            that weights near the middle of two integers flip first; otherwise it starts at its integer.
        target_mix: 1 aims at the full-precision block on full-precision inputs, 0 at the full-precision block on the
            quantized path's inputs, and what lies between at their mean with these weights.
        token_power: each token's squared error is divided by this power of its target's mean square; 0 weighs all
            tokens alike, 1 weighs relative errors.
        mixed_precision: float32 blocks are multiplied in bfloat16 on a GPU.
        seed: of the order of batches.
    """

    steps: int = 200
    optimizer: str = "adam"
    offset_rate: float = 1.0
    scale_rate: float = 0.25
    zero_rate: float = 1.0
    offset_bound: float = 1.0
    start_from_vertex: bool = True
    target_mix: float = 1.0
    token_power: float = 0.0
    mixed_precision: bool = True
    seed: int = 0
