"""Moments of few tokens, mixed with those of more tokens that are somewhat like them."""

import copy

from lkq_hf.quantization.hessian import InputMoments


def common_share(tokens: int, in_features: int) -> float:
    """The part of common moments in the mixture for something that saw `tokens` tokens of its own.

    The common moments count as much as `in_features` own tokens would, the number below which the moments of own
    tokens alone are singular.

    Returns:
        From 0 (many tokens) to 1 (none).
    """
    return in_features / (in_features + tokens)


def mixture(own: InputMoments, common: InputMoments, share: float) -> InputMoments:
    """The moments of a mixture of both kinds of tokens, `share` of them `common` ones."""
    if own.weight == 0:
        return common
    mixed = copy.copy(own)
    mixed.hessian = own.hessian.lerp(common.hessian, share)
    if own.deviation is None or common.deviation is None:
        mixed.deviation = None
    else:
        mixed.deviation = own.deviation.lerp(common.deviation, share)
    return mixed
