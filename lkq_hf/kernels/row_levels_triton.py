"""From packed words to operands of the tensor cores, inside a Triton kernel.

Two fields at a time become the two halves of a register, without a conversion from integers: a few instructions of
PTX, which Triton has no words for. Where it is interpreted, and at 8 bits, Triton's own operations do the same.
"""

import triton
import triton.language as tl

from lkq_hf.kernels.packed_fields_triton import field_value, half_powers, magic_exponent, row_features, row_words


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
            even = even + ((first.to(tl.float32, bitcast=True) - offset).to(DTYPE),)  # type: ignore[assignment]
            odd = odd + ((second.to(tl.float32, bitcast=True) - offset).to(DTYPE),)  # type: ignore[assignment]
        return tl.join(_interleave(even, BITS), _interleave(odd, BITS))
    else:
        MAGIC: tl.constexpr = 2.0 ** magic_exponent(tl.bfloat16 == DTYPE)
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
    exponent = magic_exponent(bfloat16)
    magic, one = half_powers(exponent, exponent, bfloat16), half_powers(0, 0, bfloat16)
    kind = "bf16x2" if bfloat16 else "f16x2"
    mask = (2**bits - 1) * 0x10001

    def level(target):
        return f"lop3.b32 t, t, {mask:#x}, {magic:#x}, 0xEA; fma.rn.{kind} {target}, t, one, ${pairs + words};"

    lines = [f".reg .b32 t, one; mov.b32 one, {one:#x};"]
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
