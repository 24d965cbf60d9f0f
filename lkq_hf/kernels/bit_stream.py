"""Unsigned integers of 2, 3, 4 or 8 bits in int32 words: a little-endian stream of bits along the last axis."""

import math

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def packing_unit(bits: int) -> tuple[int, int]:
    """The smallest run of values that fills whole words, as (values, words).

    It is 32 values in 3 words at 3 bits, where values 10 and 21 lie across two words, and one word at 2, 4 and 8 bits.

    Raises:
        ValueError: ``bits`` is not one of 2, 3, 4 and 8.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, found {bits}.")
    shared = math.gcd(bits, 32)
    return 32 // shared, bits // shared


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack int32 ``values`` `[..., length]`, each in ``0 .. 2**bits - 1``, into words `[..., length * bits / 32]`.

    Bit ``b`` of value ``i`` becomes bit ``(i * bits + b) % 32`` of word ``(i * bits + b) // 32``.

    Raises:
        ValueError: ``bits`` is not supported, or the length does not fill whole words.
    """
    unit_values, unit_words = packing_unit(bits)
    if values.shape[-1] % unit_values:
        raise ValueError(
            f"{bits}-bit values fill whole 32-bit words only in multiples of {unit_values}; found {values.shape[-1]}."
        )
    units = values.unflatten(-1, (-1, unit_values))
    words = values.new_zeros((*units.shape[:-1], unit_words), dtype=torch.int32)
    for i in range(unit_values):
        word, offset = divmod(i * bits, 32)
        words[..., word] |= units[..., i] << offset
        if offset + bits > 32:
            words[..., word + 1] |= units[..., i] >> (32 - offset)
    return words.flatten(-2)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: int32 words `[..., length * bits / 32]` to int32 values `[..., length]`.

    Raises:
        ValueError: ``bits`` is not supported, or the words end inside a value.
    """
    unit_values, unit_words = packing_unit(bits)
    if words.shape[-1] % unit_words:
        raise ValueError(f"{bits}-bit values come in runs of {unit_words} words; found {words.shape[-1]} words.")
    units = words.unflatten(-1, (-1, unit_words))
    values = words.new_empty((*units.shape[:-1], unit_values))
    mask = 2**bits - 1
    for i in range(unit_values):
        word, offset = divmod(i * bits, 32)
        # int32 shifts are arithmetic: the mask also removes copies of the sign bit, except where a value straddles.
        value = units[..., word] >> offset
        if offset + bits > 32:
            value = (value & (2 ** (32 - offset) - 1)) | (units[..., word + 1] << (32 - offset))
        values[..., i] = value & mask
    return values.flatten(-2)
