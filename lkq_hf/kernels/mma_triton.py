"""One instruction of the tensor cores, register by register, inside a Triton kernel.

``mma.sync.m16n8k16`` multiplies 16 x 16 by 16 x 8 numbers of half precision, for each warp. Of the operands, thread
``4 * row + quad`` of the warp holds

- on the left: rows ``row`` and ``row + 8``, each in two registers of two numbers, of inner indices ``2 * quad`` and
  ``2 * quad + 1`` in the first and of those 8 further on in the second;
- on the right: column ``row``, in two registers for the same inner indices;
- in the sums: columns ``2 * quad`` and ``2 * quad + 1`` of row ``row``, then of row ``row + 8``.

Inner indices may be in any order that both operands share. Here a register of all threads is a tensor of one element
per thread: Triton spreads a vector of ``32 * num_warps`` elements over the threads in their order.
"""

import triton
import triton.language as tl


@triton.jit
def mma(sums, left, right, BFLOAT16: tl.constexpr, INTERPRETED: tl.constexpr):
    """``sums`` plus the product.

    Args:
        sums: four float32 tensors: (row, first), (row, second), (row + 8, first), (row + 8, second column).
        left: four int32 tensors of pairs: (row, first), (row + 8, first), (row, second), (row + 8, second register).
        right: two int32 tensors of pairs.
        BFLOAT16: whether pairs are of bfloat16, else of float16.
        INTERPRETED: whether Triton's interpreter runs the kernel.
    """
    if INTERPRETED:
        WARPS: tl.constexpr = left[0].shape[0] // 32
        upper = tl.zeros((WARPS, 8, 8), tl.float32)
        lower = tl.zeros((WARPS, 8, 8), tl.float32)
        for register in tl.static_range(2):
            for half in tl.static_range(2):
                column = tl.reshape(_halves(right[register], BFLOAT16)[half], (WARPS, 1, 8, 4))
                row = tl.reshape(_halves(left[2 * register], BFLOAT16)[half], (WARPS, 8, 1, 4))
                upper += tl.sum(row * column, axis=3)
                row = tl.reshape(_halves(left[2 * register + 1], BFLOAT16)[half], (WARPS, 8, 1, 4))
                lower += tl.sum(row * column, axis=3)
        first, second = tl.split(tl.reshape(upper, (WARPS * 32, 2)))
        third, fourth = tl.split(tl.reshape(lower, (WARPS * 32, 2)))
        return (sums[0] + first, sums[1] + second, sums[2] + third, sums[3] + fourth)
    else:
        ASM: tl.constexpr = _mma_asm(BFLOAT16)
        return tl.inline_asm_elementwise(
            ASM,
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [left[0], left[1], left[2], left[3], right[0], right[1], sums[0], sums[1], sums[2], sums[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,  # all threads of a warp have to be there: it must not move into a branch
            pack=1,
        )


@triton.constexpr_function
def _mma_asm(bfloat16):
    kind = "bf16" if bfloat16 else "f16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@triton.jit
def times_pair(pairs, FACTORS: tl.constexpr, BFLOAT16: tl.constexpr, INTERPRETED: tl.constexpr):
    """Both halves of every pair times those of ``FACTORS``, a pair as an integer."""
    factors = tl.full(pairs.shape, FACTORS, tl.int32)
    if INTERPRETED:
        low, high = _halves(pairs, BFLOAT16)
        low_factor, high_factor = _halves(factors, BFLOAT16)
        return _half_bits(low * low_factor, BFLOAT16) | (_half_bits(high * high_factor, BFLOAT16) << 16)
    else:
        ASM: tl.constexpr = "mul.rn.bf16x2 $0, $1, $2;" if BFLOAT16 else "mul.rn.f16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(ASM, "=r,r,r", [pairs, factors], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _halves(pairs, BFLOAT16: tl.constexpr):
    """The lower and the upper half of every pair, in float32."""
    if BFLOAT16:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _half_bits(value, BFLOAT16: tl.constexpr):
    """The bits of float32 numbers in half precision, in the lower half of an integer."""
    if BFLOAT16:
        half = value.to(tl.bfloat16)
    else:
        half = value.to(tl.float16)
    return half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
