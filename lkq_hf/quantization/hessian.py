"""Second moments of a layer's input, and the factorization GPTQ needs."""

import copy

import torch
from torch import Tensor

from lkq_hf.quantization.precision import full_float32

TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)


class InputMoments:
    """Streaming means over calibration tokens of `H = E[X~ X~^T]` and of a deviation that `X~` lets one foresee.

    `X` is the layer's input in the full-precision network and `X~` its input in the network quantized so far
    (arXiv 2602.02126). The deviation is `R = E[(X - X~) X~^T]` or, with `out_features`, `D = E[(Y - Y~) X~^T]` of what
    the layer's output has become part of: for a sum `Y = residual + W X` it is `E[(residual - residual~) X~^T] + W R`.
    The moments are float32 running means, so their size does not grow with the token count. Tokens may count for
    different weights: `tokens` is their number, `weight` the sum of their weights.

    Args:
        in_features: the layer's input size.
        device: where the moments are kept and the products are taken.
        deviation: whether a deviation is needed; without it `add` ignores everything but `X~`.
        out_features: the layer's output size, for a deviation of outputs.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        deviation: bool = True,
        out_features: int | None = None,
    ) -> None:
        self.tokens = 0
        self.weight = 0.0
        self.of_output = out_features is not None
        rows = in_features if out_features is None else out_features
        self.hessian = torch.zeros(in_features, in_features, device=device)
        self.deviation = torch.zeros(rows, in_features, device=device) if deviation else None

    def add(
        self,
        quantized_input: Tensor,
        full: Tensor | None = None,
        quantized: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Adds the tokens of one batch.

        Args:
            quantized_input: `X~`, `[..., in_features]`.
            full: where the deviation is needed, `X`, or `Y` if it is one of outputs.
            quantized: what `full` deviates from: `Y~`; by default `X~`.
            weights: what each token counts for, `[tokens]`, not negative; by default 1.
        """
        x_tilde = quantized_input.detach().reshape(-1, quantized_input.shape[-1])
        new = x_tilde.shape[0]
        added = float(new) if weights is None else float(weights.sum())
        self.tokens += new
        if added == 0:
            return
        keep = self.weight / (self.weight + added)
        weight = 1.0 / (self.weight + added)
        self.weight += added
        weighted = x_tilde
        if weights is not None:
            x_tilde = x_tilde.float()
            weights = weights.detach().float().unsqueeze(-1)
            weighted = x_tilde * weights
        _accumulate(self.hessian, weighted, x_tilde, keep, weight)
        if self.deviation is not None:
            if full is None or (self.of_output and quantized is None):
                raise ValueError("this accumulator tracks a deviation, so it needs the full-precision values too")
            quantized = quantized_input if quantized is None else quantized
            difference = (full.detach().float() - quantized.detach().float()).reshape(new, -1)
            if weights is not None:
                difference *= weights
            if x_tilde.dtype in TENSOR_CORE_DTYPES and x_tilde.is_cuda:
                # Two halves hold what the difference of two halves can hold, but for bits that no sum would notice.
                leading = difference.to(x_tilde.dtype)
                rest = (difference - leading.float()).to(x_tilde.dtype)
                _accumulate(self.deviation, leading, x_tilde, keep, weight)
                _accumulate(self.deviation, rest, x_tilde, 1.0, weight)
            else:
                _accumulate(self.deviation, difference, x_tilde, keep, weight)

    def of_rows(self, rows: slice) -> "InputMoments":
        """The moments for some of the layer's rows: those of its input serve all, outputs have their own."""
        if not self.of_output or self.deviation is None:
            return self
        part = copy.copy(self)
        part.deviation = self.deviation[rows]
        return part

    def output_deviation(self, weight: Tensor) -> Tensor | None:
        """`D`, `[out, in]`, for the rows of `weight`: `W R`, where what is kept is a deviation of inputs."""
        if self.deviation is None or self.of_output:
            return self.deviation
        return weight @ self.deviation


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
    """`H + damping * mean(diag H) * I`, `[..., in, in]`; an all-zero `H` becomes the identity (nearest rounding)."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    shift = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    result = hessian.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(shift)
    return result


def inverse_factor(hessian: Tensor, order: Tensor | None = None) -> Tensor:
    """The upper triangular `U` with `H^-1 = U^T U`, `[batch, in, in]`, for each positive definite `H`.

    Read backwards, `H` has the Cholesky factor `L`; turned round again `L` is upper triangular, its inverse is `U`.
    One factorization and one triangular inverse: `H^-1` itself is never formed. Besides `H`, two matrices of its size
    are alive at a time: for the widest layers of large models they decide what fits on a device.

    Args:
        hessian: `H`, `[batch, in, in]`.
        order: of the rows and columns of each `H` before anything is done, int64 `[batch, in]`.

    Returns:
        `U`, all NaN for an `H` that is not positive definite in float32.
    """
    if order is None:
        matrix = hessian.flip(1, 2)
    else:
        each = torch.arange(len(hessian), device=hessian.device).view(-1, 1, 1)
        backwards = order.flip(1)
        matrix = hessian[each, backwards.unsqueeze(2), backwards.unsqueeze(1)]
    # One name for all steps, so that each frees what the one before made.
    matrix, failed = torch.linalg.cholesky_ex(matrix)
    matrix = matrix.flip(1, 2)
    factor = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device).repeat(len(matrix), 1, 1)
    factor = torch.linalg.solve_triangular(matrix, factor, upper=True, out=factor)
    return factor.masked_fill_(failed.view(-1, 1, 1) > 0, torch.nan)
