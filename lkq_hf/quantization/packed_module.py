"""What modules with packed weights have in common: scales that keep their dtype, and checks of what is loaded."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lkq_hf.kernels.bit_stream import unpack


class PackedModule(nn.Module):
    """A module with the packed weight of one matrix (see `lkq_hf.quantization.packing`) or of several of a size.

    Its float16 `scales` are a part of the stored format, and stay float16 under `.to(dtype)`.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    in_features: int
    out_features: int
    bits: int
    group_size: int
    sym: bool

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each packed tensor."""
        raise NotImplementedError

    @property
    def _advice(self) -> str:
        made_for = f"{self.bits} bits, group_size {self.group_size}, {'symmetric' if self.sym else 'asymmetric'}"
        return f"The configuration says {made_for}: the checkpoint was written with another one, or is damaged."

    def validate(self) -> None:
        """Checks loaded tensors against the configuration that this module was made from.

        Raises:
            ValueError: a tensor has the wrong shape or dtype, scales are not finite, 0, or negative in asymmetric
                weights, or symmetric weights have other zero points than `2**(bits - 1)`.
        """
        for name, (shape, dtype) in self._shapes().items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} should be {dtype} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}. "
                    f"{self._advice}"
                )
        if self.qweight.is_meta:
            return
        usable = self.scales != 0 if self.sym else self.scales > 0
        if not bool((torch.isfinite(self.scales) & usable).all()):
            raise ValueError(f"scales should be finite and {'not 0' if self.sym else 'positive'}. {self._advice}")
        middle = 2 ** (self.bits - 1)
        # The layout of symmetric weights stores zero points less one (`packing`).
        if self.sym and not bool((unpack(self.qzeros, self.bits) == middle - 1).all()):
            raise ValueError(f"symmetric zero points should all be {middle}. {self._advice}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = len(missing_keys) + len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(missing_keys) + len(error_msgs) == known:
            try:
                self.validate()
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
