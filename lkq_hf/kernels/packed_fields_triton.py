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


@triton.jit
def field_value(word0, word1, word2, FIELD: tl.constexpr, BITS: tl.constexpr):
    """One field of packed rows, int32 of the words' shape. ``word1`` and ``word2`` are read only at 3 bits."""
    OFFSET: tl.constexpr = FIELD * BITS % 32
    word, above = _words_of(word0, word1, word2, FIELD, BITS)
    value = word >> OFFSET
    if OFFSET + BITS > 32:
        value = (value & ((1 << (32 - OFFSET)) - 1)) | (above << (32 - OFFSET))
    return value & (2**BITS - 1)


@triton.constexpr_function
def subnormal_scale(field, bits):
    """What an activation is multiplied by before it meets :func:`subnormal_field`, so that products are 2**-64 q x.

    Activations stay below 2**127 up to a magnitude of 2**42, and products are normal numbers down to 2**-62.
    """
    return 2.0 ** (149 - 64 - _position(field, bits))


@triton.jit
def subnormal_field(word0, word1, word2, FIELD: tl.constexpr, BITS: tl.constexpr):
    """One field of packed rows as a float32 ``q * 2**(position - 149)``: a bit mask and no conversion.

    The bit pattern of an integer below 2**24 is that of the float32 which is 2**-149 times as large (a subnormal
    number, or one of the smallest normal ones). So fields in the lower 24 bits need only be cut out, and one shift
    serves the others. GPUs multiply subnormal numbers at full speed.
    """
    POSITION: tl.constexpr = _position(FIELD, BITS)
    OFFSET: tl.constexpr = FIELD * BITS % 32
    if OFFSET + BITS > 32:
        return field_value(word0, word1, word2, FIELD, BITS).to(tl.float32, bitcast=True)
    word, _ = _words_of(word0, word1, word2, FIELD, BITS)
    if POSITION != OFFSET:
        word = word >> (OFFSET - POSITION)
    return (word & ((2**BITS - 1) << POSITION)).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _position(field, bits):
    """The bit to which :func:`subnormal_field` brings a field's lowest bit."""
    offset = field * bits % 32
    if offset + bits <= 24:
        return offset
    return 0 if offset + bits > 32 else offset - 16


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
def row_levels(word0, word1, word2, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """All fields of packed rows less their zero points, exact in ``DTYPE`` (float16 or bfloat16).

    The words are `[columns, rows]`, ``zero`` `[columns]` in float32; further dimensions of size 2 follow in the
    result, which reshaped to `[columns, rows * fields]` has the input features in their order.
    """
    if BITS == 8 or INTERPRETED:
        # The bit pattern of 2**23 + q is that of 2**23 with q in its lowest bits.
        offset = zero[:, None] + 8388608.0
        even = ()
        odd = ()
        for pair in tl.static_range(row_features(BITS) // 2):
            first = field_value(word0, word1, word2, 2 * pair, BITS) | 0x4B000000
            second = field_value(word0, word1, word2, 2 * pair + 1, BITS) | 0x4B000000
            even = even + ((first.to(tl.float32, bitcast=True) - offset).to(DTYPE),)  # type: ignore[assignment]  # noqa: RUF005
            odd = odd + ((second.to(tl.float32, bitcast=True) - offset).to(DTYPE),)  # type: ignore[assignment]  # noqa: RUF005
        return tl.join(_interleave(even, BITS), _interleave(odd, BITS))
    else:
        MAGIC: tl.constexpr = 128.0 if tl.bfloat16 == DTYPE else 1024.0
        minus = (-MAGIC - zero).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        minus = tl.broadcast_to((minus | (minus << 16))[:, None], word0.shape)
        asm: tl.constexpr = _level_pairs_asm(BITS, tl.bfloat16 == DTYPE)
        constraints: tl.constexpr = _level_pairs_constraints(BITS)
        dtypes: tl.constexpr = _int32_pairs(BITS)
        if BITS == 3:
            pairs = tl.inline_asm_elementwise(
                asm, constraints, [word0, word1, word2, minus], dtype=dtypes, is_pure=True, pack=1
            )
        else:
            pairs = tl.inline_asm_elementwise(asm, constraints, [word0, minus], dtype=dtypes, is_pure=True, pack=1)
        pairs = _interleave(pairs, BITS)
        lower = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        return tl.join(lower, (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True))


@triton.constexpr_function
def _level_pairs_asm(bits, bfloat16):
    """PTX from the words of a packed row to its levels, two to a register: fields 2j and 2j + 1 in operand j.

    After the outputs come the words, then -(magic + zero point) in both halves. A half with a field in the lowest bits
    of its mantissa is magic + q, and magic is so large that this is exact; one fused multiply-add takes it to q - z.
    """
    pairs, words = row_features(bits) // 2, row_words(bits)
    word = [f"${pairs + i}" for i in range(words)]
    if bfloat16:
        magic, one, kind = "0x43004300", "0x3F803F80", "bf16x2"
    else:
        magic, one, kind = "0x64006400", "0x3C003C00", "f16x2"
    mask = (2**bits - 1) * 0x10001

    def level(target):
        return f"lop3.b32 t, t, {mask:#x}, {magic}, 0xEA; fma.rn.{kind} {target}, t, one, ${pairs + words};"

    lines = [f".reg .b32 t, one; mov.b32 one, {one};"]
    if bits == 4:
        for j in range(pairs):
            lines.append(f"prmt.b32 t, {word[0]}, 0, 0x444{j}; mul.lo.u32 t, t, 0x1001; {level(f'${j}')}")
    elif bits == 3:
        for j in range(pairs):
            i, offset = divmod(6 * j, 32)
            if offset + 6 <= 32:
                lines.append(f"bfe.u32 t, {word[i]}, {offset}, 6;")
            else:
                lines.append(f"shf.r.wrap.b32 t, {word[i]}, {word[i + 1]}, {offset}; and.b32 t, t, 0x3F;")
            lines.append(f"mul.lo.u32 t, t, 0x2001; {level(f'${j}')}")
    else:
        # Fields 8 apart are cut out together, and then sorted.
        lines.append(".reg .b32 p<8>;")
        for field in range(8):
            lines.append(f"shr.u32 t, {word[0]}, {2 * field}; {level(f'p{field}')}")
        for j in range(4):
            lines.append(f"prmt.b32 ${j}, p{2 * j}, p{2 * j + 1}, 0x5410;")
            lines.append(f"prmt.b32 ${j + 4}, p{2 * j}, p{2 * j + 1}, 0x7632;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _level_pairs_constraints(bits):
    return ",".join(["=r"] * (row_features(bits) // 2) + ["r"] * (row_words(bits) + 1))


@triton.constexpr_function
def _int32_pairs(bits):
    return (tl.int32,) * (row_features(bits) // 2)


@triton.jit
def _interleave(parts, BITS: tl.constexpr):
    """Half as many tensors as a packed row has fields, joined: the last dimensions count them in order."""
    if BITS == 8:
        return tl.join(parts[0], parts[1])
    elif BITS == 4:
        return _interleave4(parts[0], parts[1], parts[2], parts[3])
    elif BITS == 2:
        return _interleave8(parts, 0, 1)
    else:
        return tl.join(_interleave8(parts, 0, 2), _interleave8(parts, 1, 2))


@triton.jit
def _interleave4(a, b, c, d):
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _interleave8(parts, FIRST: tl.constexpr, STEP: tl.constexpr):
    even = _interleave4(parts[FIRST], parts[FIRST + 2 * STEP], parts[FIRST + 4 * STEP], parts[FIRST + 6 * STEP])
    odd = _interleave4(parts[FIRST + STEP], parts[FIRST + 3 * STEP], parts[FIRST + 5 * STEP], parts[FIRST + 7 * STEP])
    return tl.join(even, odd)


@triton.jit
def load_zeros(qzeros, group, column, mask, columns, BITS: tl.constexpr):
    """Zero points of ``(group, column)`` pairs as float32; ``group``, ``column`` and ``mask`` broadcast together."""
    bit = column * BITS
    offset = bit % 32
    pointers = qzeros + group * (columns * BITS // 32) + bit // 32
    value = tl.load(pointers, mask=mask, other=0) >> offset
    if BITS == 3:
        known = (32 - offset) & 31
        above = tl.load(pointers + 1, mask=mask & (offset > 29), other=0)
        value = tl.where(offset > 29, (value & ((1 << known) - 1)) | (above << known), value)
    return (value & (2**BITS - 1)).to(tl.float32)
