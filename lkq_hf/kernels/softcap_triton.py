"""Logits of attention in base 2, capped or not, for kernels that take exp2 of them."""

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)


def logit_scales(scaling: float, softcap: float | None) -> tuple[float, float]:
    """``scale`` and ``softcap`` of `base2_logits`."""
    return scaling * LOG2_E * (1 if softcap is None else 2 / softcap), (softcap or 0.0) * LOG2_E


@triton.jit
def base2_logits(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Dot products to base-2 logits. With a softcap, ``scale`` turns a dot product into the 2x of exp(2x) below."""
    logits = products * scale
    if HAS_SOFTCAP:
        logits = softcap - 2 * softcap / (tl.exp2(logits) + 1)  # softcap * tanh(x)
    return logits
