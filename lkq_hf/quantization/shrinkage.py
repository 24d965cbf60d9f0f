"""Moments of few tokens, mixed with those of more tokens that are like them."""

import copy

from lkq_hf.quantization.hessian import InputMoments


def common_share(own: InputMoments, common: InputMoments) -> float:
    """The part of `common` in the mixture that is nearest to the moments of infinitely many tokens like `own`'s.

    That is the linear shrinkage of Ledoit and Wolf (2004, "A well-conditioned estimator for large-dimensional
    covariance matrices"), towards `common` instead of a multiple of the identity. With the sample second moments `S`
    of `n` tokens `y`, the mixture `(1 - p) S + p F` has the least expected squared distance from `E[y y^T]` at
    `p = var(S) / |S - F|^2`, and `(mean |y|^4 - |S|^2) / n` estimates `var(S)`.

    Returns:
        From 0 (many tokens, or ones unlike all others) to 1 (no token).
    """
    if own.weight == 0:
        return 1.0
    variance = (own.mean_fourth_power - float(own.hessian.square().sum())) / own.tokens
    distance = float((own.hessian - common.hessian).square().sum())
    return 1.0 if variance >= distance else max(variance, 0.0) / distance


def mixture(own: InputMoments, common: InputMoments, share: float) -> InputMoments:
    """The moments of a mixture of both kinds of tokens, `share` of them `common` ones."""
    if share == 1.0 and own.weight == 0:
        return common
    mixed = copy.copy(own)
    mixed.hessian = own.hessian.lerp(common.hessian, share)
    if own.deviation is None or common.deviation is None:
        mixed.deviation = None
    else:
        mixed.deviation = own.deviation.lerp(common.deviation, share)
    return mixed
