"""Packed rows as pairs of half precision numbers for `mma_triton`, inside a Triton kernel.

A pair is two fields of one packed row, cut out of its words by one shift and one bit operation. The operation also
puts the fields into the mantissas of a number *magic*, 2**7 in bfloat16 and 2**10 in float16, which makes the half
``magic + 2**position * q``, without a conversion from integers. The product with an activation divided by
``2**position`` is then ``q x`` and a multiple of the activation, of which `plain_pairs` gets the sum.

At 8 bits, whose fields bfloat16's mantissa cannot hold, a field is taken as two fields of 4 bits.
"""

import triton
import triton.language as tl

from lkq_hf.kernels.mma_triton import times_pair
from lkq_hf.kernels.packed_fields_triton import and_or, bits_from, half_powers, magic_exponent

# Per pair: its word, the shift to the right, the mask, its features, the positions of both, whether a sum over
# activations counts these features (at 8 bits each has two fields). Word 3 stands for the pair that lies across words.


@triton.constexpr_function
def _pairs(bits, bfloat16):
    if bits == 8:
        # q / 16 = upper + lower / 16
        return [
            (0, 4 * j, 0x000F000F, (j // 2, 2 + j // 2), ((0, 0) if j % 2 else (4, 4)), j % 2 == 1) for j in range(4)
        ]
    if bits == 4:
        return [(0, 4 * j, 0x000F000F, (j, j + 4), (0, 0), True) for j in range(4)]
    # Pairs of one shift: bfloat16 can divide activations without leaving its range, float16 cannot.
    if bits == 2:
        together = 3 if bfloat16 else 1
        return [
            (0, 2 * (j - j % together), 0x00030003 << 2 * (j % together), (j, j + 8), (2 * (j % together),) * 2, True)
            for j in range(8)
        ]
    # Fields 5 apart are 15 bits apart: the upper one's half begins one bit after the lower one's.
    together = 2 if bfloat16 else 1
    within = [
        (
            word,
            first_bit + 3 * (i - i % together) - 1,
            0x0007000E << 3 * (i % together),
            (first + i, first + i + 5),
            (3 * (i % together) + 1, 3 * (i % together)),
            True,
        )
        for word, (first, first_bit) in enumerate(((0, 0), (11, 1), (22, 2)))
        for i in range(5)
    ]
    return [*within, (3, 0, 0x0007000E, (10, 21), (1, 0), True)]


@triton.constexpr_function
def pair_count(bits):
    """Pairs of a packed row."""
    return len(_pairs(bits, False))


@triton.constexpr_function
def level_factor(bits):
    """What products of levels and activations have still to be multiplied by."""
    return 16.0 if bits == 8 else 1.0


@triton.jit
def level_pair(
    word0,
    word1,
    word2,
    PAIR: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT16: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One pair of packed rows. ``word1`` and ``word2`` are read only at 3 bits."""
    WORD: tl.constexpr = _word(PAIR, BITS, BFLOAT16)
    SHIFT: tl.constexpr = _shift(PAIR, BITS, BFLOAT16)
    MASK: tl.constexpr = _mask(PAIR, BITS, BFLOAT16)
    MAGIC: tl.constexpr = half_powers(magic_exponent(BFLOAT16), magic_exponent(BFLOAT16), BFLOAT16)
    if WORD == 3:
        lower = bits_from(word0, word1, 29, INTERPRETED)
        upper = bits_from(word1, word2, 15, INTERPRETED)
        fields = (lower & 0xFFFF) | (upper & -65536)
    else:
        if WORD == 0:
            fields = word0
        elif WORD == 1:
            fields = word1
        else:
            fields = word2
        if SHIFT > 0:
            fields = fields >> SHIFT
        elif SHIFT < 0:
            fields = fields << -SHIFT
    return and_or(fields, MASK, MAGIC, INTERPRETED)


@triton.jit
def activation_pair(
    activations, PAIR: tl.constexpr, BITS: tl.constexpr, BFLOAT16: tl.constexpr, INTERPRETED: tl.constexpr
):
    """What a pair of levels is multiplied by. ``activations``: a packed row's, two to an int32, in their order."""
    FIRST: tl.constexpr = _feature(PAIR, 0, BITS, BFLOAT16)
    SECOND: tl.constexpr = _feature(PAIR, 1, BITS, BFLOAT16)
    first = activations[FIRST // 2]
    second = activations[SECOND // 2]
    if INTERPRETED:
        if FIRST % 2 == 1:
            first = first >> 16
        if SECOND % 2 == 0:
            second = second << 16
        pair = (first & 0xFFFF) | (second & -65536)
    else:
        ASM: tl.constexpr = _halves_asm(FIRST % 2, SECOND % 2)
        pair = tl.inline_asm_elementwise(ASM, "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1)
    if _divided(PAIR, BITS, BFLOAT16):
        FACTORS: tl.constexpr = _powers(PAIR, -1, BITS, BFLOAT16)
        pair = times_pair(pair, FACTORS, BFLOAT16, INTERPRETED)
    return pair


@triton.jit
def plain_pairs(like, FIRST: tl.constexpr, SECOND: tl.constexpr, BITS: tl.constexpr, BFLOAT16: tl.constexpr):
    """A left operand for two pairs: rows 0 to 7 sum what activation pairs hold, rows 8 to 15 the activations."""
    ONES: tl.constexpr = half_powers(0, 0, BFLOAT16)
    FIRST_POWERS: tl.constexpr = _powers(FIRST, 1, BITS, BFLOAT16)
    SECOND_POWERS: tl.constexpr = _powers(SECOND, 1, BITS, BFLOAT16)
    ones = tl.full(like.shape, ONES, tl.int32)
    return (
        ones,
        tl.full(like.shape, FIRST_POWERS, tl.int32),
        ones,
        tl.full(like.shape, SECOND_POWERS, tl.int32),
    )


@triton.constexpr_function
def _word(pair, bits, bfloat16):
    return _pairs(bits, bfloat16)[pair][0]


@triton.constexpr_function
def _shift(pair, bits, bfloat16):
    return _pairs(bits, bfloat16)[pair][1]


@triton.constexpr_function
def _mask(pair, bits, bfloat16):
    return _pairs(bits, bfloat16)[pair][2]


@triton.constexpr_function
def _feature(pair, half, bits, bfloat16):
    return _pairs(bits, bfloat16)[pair][3][half]


@triton.constexpr_function
def _divided(pair, bits, bfloat16):
    return _pairs(bits, bfloat16)[pair][4] != (0, 0)


@triton.constexpr_function
def _powers(pair, sign, bits, bfloat16):
    """``2**(sign * position)`` of both halves, as a pair; above all 0 for activations that are not to be counted."""
    _, _, _, _, positions, counted = _pairs(bits, bfloat16)[pair]
    if sign > 0 and not counted:
        return 0
    return half_powers(sign * positions[0], sign * positions[1], bfloat16)


@triton.constexpr_function
def _halves_asm(first_half, second_half):
    """The ``first_half`` of one register below the ``second_half`` of another."""
    return f"prmt.b32 $0, $1, $2, {(0x7600 if second_half else 0x5400) | (0x32 if first_half else 0x10):#x};"
