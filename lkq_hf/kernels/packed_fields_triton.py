"""Unpacking inside Triton kernels.

A packed *row* of the GPTQ layout is the shortest run of input features that fills whole words: 16, 32, 8 or 4 features
(*fields*) at 2, 3, 4 or 8 bits, in three words at 3 bits and in one otherwise.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def row_features(bits):
    """Input features in a packed row."""
    return {2: 16, 3: 32, 4: 8, 8: 4}[bits]


@triton.constexpr_function
def row_words(bits):
    """Words in a packed row."""
    return 3 if bits == 3 else 1


@triton.constexpr_function
def magic_exponent(bfloat16):
    """How many mantissa bits a half has: ``2**that`` plus a small integer has the integer in its lowest bits."""
    return 7 if bfloat16 else 10


@triton.constexpr_function
def half_powers(low, high, bfloat16):
    """The bits of ``2**low`` in the lower half of a register, and of ``2**high`` in the upper one."""
    bias, mantissa_bits = (127, 7) if bfloat16 else (15, 10)
    return ((bias + low) << mantissa_bits) | ((bias + high) << mantissa_bits << 16)


@triton.jit
def load_words(pointers, mask, columns, BITS: tl.constexpr):
    """The three words of packed rows, of which ``pointers`` are to the first; a row of one word has it three times."""
    word0 = tl.load(pointers, mask=mask, other=0)
    word1 = word0
    word2 = word0
    if row_words(BITS) == 3:
        word1 = tl.load(pointers + columns, mask=mask, other=0)
        word2 = tl.load(pointers + 2 * columns, mask=mask, other=0)
    return word0, word1, word2


@triton.jit
def field_value(word0, word1, word2, FIELD: tl.constexpr, BITS: tl.constexpr):
    """One field of packed rows, int32 of the words' shape. ``word1`` and ``word2`` are read only at 3 bits."""
    OFFSET: tl.constexpr = FIELD * BITS % 32
    word, above = _words_of(word0, word1, word2, FIELD, BITS)
    value = word >> OFFSET
    if OFFSET + BITS > 32:
        value = (value & ((1 << (32 - OFFSET)) - 1)) | (above << (32 - OFFSET))
    return value & (2**BITS - 1)


@triton.jit
def _words_of(word0, word1, word2, FIELD: tl.constexpr, BITS: tl.constexpr):
    """The word in which a field begins, and the one above it."""
    if FIELD * BITS < 32:
        return word0, word1
    elif FIELD * BITS < 64:
        return word1, word2
    else:
        return word2, word2


@triton.jit
def load_zero_words(qzeros, group, column, mask, columns, BITS: tl.constexpr):
    """The words with the zero points of ``(group, column)`` pairs, and those above them, read only at 3 bits.

    ``group``, ``column`` and ``mask`` broadcast together.
    """
    bit = column * BITS
    pointers = qzeros + group * (columns * BITS // 32) + bit // 32
    word = tl.load(pointers, mask=mask, other=0)
    above = word
    if BITS == 3:
        above = tl.load(pointers + 1, mask=mask & (bit % 32 > 29), other=0)
    return word, above


@triton.jit
def zero_values(word, above, column, BITS: tl.constexpr):
    """The zero points, as float32, from the words of `load_zero_words`."""
    offset = column * BITS % 32
    value = word >> offset
    if BITS == 3:
        known = (32 - offset) & 31
        value = tl.where(offset > 29, (value & ((1 << known) - 1)) | (above << known), value)
    return (value & (2**BITS - 1)).to(tl.float32)


@triton.jit
def and_or(word, MASK: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """``(word & MASK) | BITS``, of which Triton's compiler would make two instructions."""
    if INTERPRETED:
        return (word & MASK) | BITS
    else:
        ASM: tl.constexpr = _and_or_asm(MASK)
        bits = tl.full(word.shape, BITS, tl.int32)
        return tl.inline_asm_elementwise(ASM, "=r,r,r", [word, bits], dtype=tl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def _and_or_asm(mask):
    return f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;"


@triton.jit
def bits_from(word, above, right, INTERPRETED: tl.constexpr):
    """The 32 bits from bit ``right`` on, 1 to 31, of a word and the one above it."""
    if INTERPRETED:
        below = word.to(tl.uint32, bitcast=True) >> right
        return (below | (above.to(tl.uint32, bitcast=True) << (32 - right))).to(tl.int32, bitcast=True)
    else:
        # Triton's compiler would make three instructions of it.
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [word, above, right], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def load_four(pointers, mask=None):
    """Four neighbors from every pointer, as four tensors."""
    pointers = pointers[:, None] + tl.arange(0, 4)[None, :]
    four = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_two(pointers, mask):
    """Two neighbors from every pointer, as two tensors."""
    return tl.split(tl.load(pointers[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None], other=0))


@triton.jit
def load_four_zeros(qzeros, group, column, mask, columns, BITS: tl.constexpr):
    """The word with the zero points of a group for ``column``, a multiple of 4, and the three after it.

    At 3 bits there are two words: what the first one has no room for is in the second.
    """
    pointers = qzeros + (group * columns + column) * BITS // 32
    if BITS == 3:
        above = tl.load(pointers + 1, mask=mask & (column * BITS % 32 > 20), other=0)
        return tl.load(pointers, mask=mask, other=0), above
    else:
        return (tl.load(pointers, mask=mask, other=0),)


@triton.jit
def four_zeros(words, column, BITS: tl.constexpr):
    """From the words of `load_four_zeros`, one that begins with the zero point of ``column``."""
    word = words[0]
    offset = column * BITS % 32
    if BITS == 3:
        low = (word >> offset) & (2147483647 >> (offset - 1))
        word = tl.where(offset == 0, word, low | (words[1] << (32 - offset)))
    elif BITS < 8:
        word = word >> offset
    return word


@triton.jit
def four_halves(pairs, INDEX: tl.constexpr):
    """Number ``INDEX`` of four float16 numbers that are two pairs of int32, as float32."""
    bits = pairs[INDEX // 2] >> (16 * (INDEX % 2))
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def field_number(word, FIELD: tl.constexpr, BITS: tl.constexpr):
    """One field of a word in float32, by its bits: those of ``2**23 + q`` are of 2**23, with q in the lowest ones."""
    bits = ((word >> (BITS * FIELD)) & (2**BITS - 1)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def fetch(pointers, wanted):
    """Have the L2 cache, which is never out of date, fetch what pointers point to, where it is wanted."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [pointers, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
