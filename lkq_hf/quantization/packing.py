"""The GPTQ tensor layout: a contract, bit for bit, with other engines.

For a Linear with `K` input features, `N` output features, `b` bits and `G` groups of input features:

| tensor | dtype and shape | content |
|---|---|---|
| `qweight` | int32 `[K * b / 32, N]` | the integers, packed along `K` |
| `qzeros` | int32 `[G, N * b / 32]` | the zero points, packed along `N` |
| `scales` | float16 `[G, N]` | |
| `g_idx` | int32 `[K]` | `k // group_size` |

so that `w[n, k] = scales[g, n] * (q[k, n] - z[g, n])`. Packing is a little-endian stream of bits
(`lkq_hf.kernels.bit_stream`).

Two versions of the layout differ in `qzeros`. Version 2 (`checkpoint_format: "gptq_v2"`) stores the zero points `z`.
Version 1 (`"gptq"`) stores `z - 1`, for historical reasons, and a reader adds the one back; but a zero point 0 has no
`z - 1` among unsigned fields. Some tools convert between the versions by subtracting packed ones from each whole
32-bit word. That is the same while nothing borrows; but a zero point 0 borrows from its neighbor in the word, and at
3 bits, where zero points 10 and 21 of 32 lie across two words, even `4 - 1` borrows, and the borrow is lost. So the
fields are what counts (today's readers of 3-bit checkpoints agree), and the rule is: symmetric weights, whose zero
points are `2**(b - 1)`, are written as version 1, which every engine reads, and asymmetric ones as version 2.
"""

import torch
from torch import Tensor

from lkq_hf.kernels.bit_stream import pack, packing_unit, unpack
from lkq_hf.quantization.weight import QuantizedWeight

MULTIPLE = 32
"""Both sides of a weight must be multiples of this, so that every bit width packs into whole words."""


def checkpoint_format(sym: bool) -> str:
    """The version of the layout: `"gptq"` (1) for symmetric weights, `"gptq_v2"` for asymmetric ones."""
    return "gptq" if sym else "gptq_v2"


def packed_shapes(
    in_features: int, out_features: int, bits: int, group_size: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of one packed Linear, without its bias.

    Raises:
        ValueError: the sizes do not pack, or `group_size` does not divide `in_features`.
    """
    packing_unit(bits)
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size <= 0 or size % MULTIPLE:
            raise ValueError(
                f"A Linear packs when in_features and out_features are multiples of {MULTIPLE}; found {name}={size} "
                f"(in_features={in_features}, out_features={out_features})."
            )
    if group_size <= 0 or in_features % group_size:
        raise ValueError(f"group_size must be positive and divide in_features={in_features}; found {group_size}.")
    groups = in_features // group_size
    return {
        "qweight": ((in_features * bits // 32, out_features), torch.int32),
        "qzeros": ((groups, out_features * bits // 32), torch.int32),
        "scales": ((groups, out_features), torch.float16),
        "g_idx": ((in_features,), torch.int32),
    }


def group_index(in_features: int, group_size: int, device: torch.device | str | None = None) -> Tensor:
    """`g_idx`: the group of each input feature, int32 `[in_features]`."""
    return torch.arange(in_features, dtype=torch.int32, device=device) // group_size


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors `qweight`, `qzeros`, `scales` and `g_idx` of a quantized weight, on its device.

    Raises:
        ValueError: the weight's sizes do not pack.
    """
    out_features, in_features = weight.integers.shape
    packed_shapes(in_features, out_features, weight.bits, weight.group_size)
    return {
        "qweight": pack(weight.integers.to(torch.int32), weight.bits).t().contiguous(),
        "qzeros": pack_zeros(weight.zeros, weight.bits, weight.sym),
        "scales": weight.scales.to(torch.float16).t().contiguous(),
        "g_idx": group_index(in_features, weight.group_size, weight.integers.device),
    }


def unpack_weight(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, bits: int, group_size: int, sym: bool
) -> QuantizedWeight:
    """The inverse of `pack_weight`; `sym` says which version of the layout `qzeros` has."""
    return QuantizedWeight(
        integers=unpack(qweight.t(), bits),
        scales=scales.t().contiguous(),
        zeros=unpack_zeros(qzeros, bits, sym),
        bits=bits,
        group_size=group_size,
        sym=sym,
    )


def pack_zeros(zeros: Tensor, bits: int, sym: bool) -> Tensor:
    """Zero points int32 `[out_features, groups]` to `qzeros` `[groups, out_features * bits / 32]`."""
    return pack((zeros - 1 if sym else zeros).t(), bits)


def unpack_zeros(qzeros: Tensor, bits: int, sym: bool) -> Tensor:
    """`qzeros` `[groups, out_features * bits / 32]` to zero points int32 `[out_features, groups]`."""
    stored = unpack(qzeros, bits).t().contiguous()
    return stored + 1 if sym else stored
