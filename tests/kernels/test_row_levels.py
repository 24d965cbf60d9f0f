"""The PTX inside the quantised product, which only a GPU runs: its bit arithmetic, instruction by instruction."""

import re

import pytest
import torch

from lkq_hf.kernels.bit_stream import pack

pytest.importorskip("triton")

WORD = 2**32 - 1


def run_ptx(text: str, operands: dict[str, int]) -> dict[str, int]:
    """Registers after the integer instructions of ``text``; ``fma`` copies its first operand."""
    registers = dict(operands)

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def permute(low: int, high: int, selector: int) -> int:
        octets = (low | high << 32).to_bytes(8, "little")
        return int.from_bytes(bytes(octets[selector >> 4 * i & 7] for i in range(4)), "little")

    operations = {
        "prmt.b32": permute,
        "mul.lo.u32": lambda a, b: a * b & WORD,
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "bfe.u32": lambda a, start, length: a >> start & (1 << length) - 1,
        "shf.r.wrap.b32": lambda low, high, count: (high << 32 | low) >> count & WORD,
        "lop3.b32": lambda a, b, c, table: {0xEA: a & b | c}[table],
        "mov.b32": lambda a: a,
    }
    for line in re.findall(r"[^;{}]+(?=;)", text.replace("<8>", "")):
        name, arguments = line.split(maxsplit=1)
        if name == ".reg":
            continue
        target, *sources = (argument.strip() for argument in arguments.split(","))
        operation = operations.get(name, lambda first, *rest: first)
        assert name in operations or name.startswith("fma.rn.")
        registers[target] = operation(*map(value, sources))
    return registers


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pairs_of_fields_in_their_order(bits: int, bfloat16: bool) -> None:
    from lkq_hf.kernels.row_levels_triton import _level_pairs_asm, _level_pairs_constraints

    fields = {2: 16, 3: 32, 4: 8}[bits]
    integers = torch.randint(0, 2**bits, (1, fields), generator=torch.Generator().manual_seed(bits)).int()
    words = [word & WORD for word in pack(integers, bits)[0].tolist()]
    pairs = fields // 2
    operands = {f"${pairs + i}": word for i, word in enumerate(words)} | {f"${pairs + len(words)}": 0}
    registers = run_ptx(_level_pairs_asm(bits, bfloat16), operands)
    magic = 0x4300 if bfloat16 else 0x6400
    found = [registers[f"${j}"] >> 16 * half & 0xFFFF for j in range(pairs) for half in (0, 1)]
    assert found == [magic | q for q in integers[0].tolist()]
    assert _level_pairs_constraints(bits).count("r") == pairs + len(words) + 1


def test_the_magic_numbers_hold_every_field() -> None:
    for magic, dtype, base in ((0x4300, torch.bfloat16, 128), (0x6400, torch.float16, 1024)):
        halves = torch.tensor([magic | q for q in range(16)], dtype=torch.int16).view(dtype)
        assert halves.tolist() == [base + q for q in range(16)]
