"""Second moments of a layer's input, and the factorisation GPTQ needs."""

import torch
from torch import Tensor

from lkq_hf.quantization.precision import full_float32

TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)


class InputMoments:
    """Streaming means over calibration tokens of `H = E[X~ X~^T]` and `R = E[(X - X~) X~^T]`.

    `X` is the layer's input in the full-precision network and `X~` its input in the network quantised so far
    (arXiv 2602.02126). Both moments are float32 running means, so their size does not grow with the token count.

    Args:
        in_features: the layer's input size.
        device: where the moments are kept and the products are taken.
        deviation: whether `R` is needed; without it `add` ignores the full-precision input.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", deviation: bool = True) -> None:
        self.tokens = 0
        self.hessian = torch.zeros(in_features, in_features, device=device)
        self.deviation = torch.zeros(in_features, in_features, device=device) if deviation else None

    def add(self, quantized_input: Tensor, full_input: Tensor | None = None) -> None:
        """Adds the tokens of one batch: `X~` and, where the deviation is needed, `X`, both `[..., in_features]`."""
        x_tilde = quantized_input.detach().reshape(-1, quantized_input.shape[-1])
        new = x_tilde.shape[0]
        if new == 0:
            return
        keep = self.tokens / (self.tokens + new)
        weight = 1.0 / (self.tokens + new)
        _accumulate(self.hessian, x_tilde, x_tilde, keep, weight)
        if self.deviation is not None:
            if full_input is None:
                raise ValueError("this accumulator tracks the deviation, so it needs the full-precision input too")
            x = full_input.detach().reshape(-1, full_input.shape[-1])
            difference = x.float() - x_tilde.float()
            if x_tilde.dtype in TENSOR_CORE_DTYPES and x_tilde.is_cuda:
                # Two halves hold what the difference of two halves can hold, but for bits that no sum would notice.
                leading = difference.to(x_tilde.dtype)
                rest = (difference - leading.float()).to(x_tilde.dtype)
                _accumulate(self.deviation, leading, x_tilde, keep, weight)
                _accumulate(self.deviation, rest, x_tilde, 1.0, weight)
            else:
                _accumulate(self.deviation, difference, x_tilde, keep, weight)
        self.tokens += new


def _accumulate(moment: Tensor, left: Tensor, right: Tensor, keep: float, weight: float) -> None:
    """`moment = keep * moment + weight * left^T right`, in float32.

    Products of half-precision numbers are exact in float32, so that tensor cores, which multiply them and sum in
    float32, lose nothing.
    """
    if right.dtype in TENSOR_CORE_DTYPES and right.is_cuda:
        product = torch.mm(left.T, right, out_dtype=torch.float32)
        moment.mul_(keep).add_(product, alpha=weight)
    else:
        with full_float32():
            moment.addmm_(left.float().T, right.float(), beta=keep, alpha=weight)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`H + damping * mean(diag H) * I`, `[in, in]`; an all-zero `H` becomes the identity (nearest rounding)."""
    mean = hessian.diagonal().mean()
    shift = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    result = hessian.clone()
    result.diagonal().add_(shift)
    return result


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular `U` with `H^-1 = U^T U`, `[in, in]`, for a positive definite `H`.

    Read backwards, `H` has the Cholesky factor `L`; turned round again `L` is upper triangular, its inverse is `U`.
    One factorisation and one triangular inverse: `H^-1` itself is never formed.

    Raises:
        torch.linalg.LinAlgError: `H` is not positive definite in float32.
    """
    backwards = torch.linalg.cholesky(hessian.flip(0, 1))
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(backwards.flip(0, 1), identity, upper=True)
