"""What the compiler makes of some kernels for Hopper and Ampere; no GPU is needed to look at it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"

COMPILE = """
import subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lkq_hf.kernels.quantized_gemm_triton import _gemm_kernel
from lkq_hf.kernels.quantized_grouped_matmul import _TILES
from lkq_hf.kernels.quantized_matmul import _GEMM_TILES

target, disassembler, capability, bits, group_size, experts = *sys.argv[1:3], *map(int, sys.argv[3:])
pointers = {
    "x": "*bf16", "qweight": "*i32", "qzeros": "*i32", "scales": "*fp16", "partial": "*bf16", "row_ends": "*i32"
}
tiles = _TILES if experts else _GEMM_TILES
aligned = (*pointers, "columns", "in_features")
names = _gemm_kernel.arg_names
for block_m, block_k, num_warps, num_stages in {tuple(tile[:4]) for same in tiles.values() for tile in same}:
    constants = {
        "BITS": bits, "SYM": False, "BLOCK_M": block_m, "BLOCK_N": 16 * num_warps, "BLOCK_K": block_k,
        "TILE_GROUPS": max(1, block_k // group_size), "STAGES": num_stages, "AHEAD": 2, "INTERPRETED": False,
        "DEPENDENT": capability >= 90 and not experts, "EXPERTS": experts,
    }
    kernel = triton.compile(
        ASTSource(
            _gemm_kernel,
            {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
            constants,
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    with open(target, "wb") as file:
        file.write(kernel.asm["cubin"])
    print("KERNEL", block_m, block_k, num_warps, num_stages)
    print(subprocess.run([disassembler, "-c", target], capture_output=True, text=True, check=True).stdout)
"""

COMPILE_ATTENTION = """
import subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lkq_hf.kernels.ragged_attention_triton import _attend_kernel, default_tile

target, disassembler, capability, query_rows, head_dim, whole = *sys.argv[1:3], *map(int, sys.argv[3:])
pointers = {
    **dict.fromkeys(("query", "keys", "values", "tail_key", "tail_value", "output"), "*bf16"),
    **{"starts": "*i64", "lengths": "*i32", "partial": "*fp32", "statistics": "*fp32", "tail_mask": "*u8"},
}
tile = default_tile(query_rows, head_dim, 2, 2**17)
constants = {
    "sinks": None, "GROUPS": 4, "HEAD_DIM": head_dim, "VALUE_DIM": head_dim, "HAS_SOFTCAP": False,
    "WHOLE": bool(whole), "BLOCK_ROWS": tile.rows, "BLOCK_ENTRIES": tile.entries, "BLOCK_HEAD_DIM": head_dim,
    "BLOCK_VALUE_DIM": head_dim, "STAGES": tile.stages, "DEPENDENT": capability >= 90,
}
if whole:
    constants["tail_mask"] = None
    del pointers["tail_mask"]
types = pointers | {"scale": "fp32", "softcap": "fp32"}
names = _attend_kernel.arg_names
aligned = [*pointers, *(name for name in names if "stride" in name and "mask" not in name)]
kernel = triton.compile(
    ASTSource(
        _attend_kernel,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    ),
    target=GPUTarget("cuda", capability, 32),
    options={"num_warps": tile.warps},
)
with open(target, "wb") as file:
    file.write(kernel.asm["cubin"])
print("SHARED", kernel.metadata.shared)
print(subprocess.run([disassembler, "-c", target], capture_output=True, text=True, check=True).stdout)
"""

COMPILE_FEW_ROWS = """
import subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lkq_hf.kernels.dequantize_triton import _THREADS, _dequantize_kernel
from lkq_hf.kernels.quantized_gemv_triton import _gemv_kernel
from lkq_hf.kernels.quantized_matmul import _GEMV_TILES

target, disassembler, bits = *sys.argv[1:3], int(sys.argv[3])

def show(kernel, types, constants, options):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {}
    for place, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(len(kind))}
        elif name in (*types, "columns", "all_columns", "in_features"):
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with open(target, "wb") as file:
        file.write(compiled.asm["cubin"])
    print(subprocess.run([disassembler, "-c", target], capture_output=True, text=True, check=True).stdout)

for most, tiles in _GEMV_TILES.items():
    for num_warps, column_tiles, registers, ahead, _ in tiles:
        print("KERNEL", most, num_warps, column_tiles, registers)
        show(
            _gemv_kernel,
            {
                "x": "*bf16", "weights": ("*i32", "*i32", "*fp16"), "widths": ("i32",), "partial": "*fp32"
            },
            {
                "BITS": bits, "SYM": False, "BFLOAT16": True, "CHUNK": 128, "GROUP_SIZE": 128,
                "COLUMN_TILES": column_tiles, "WEIGHTS": 1, "WARPS": num_warps, "AHEAD": ahead,
                "FETCH": ahead > 1, "DEPENDENT": True, "INTERPRETED": False, "ROW_TILES": max(1, most // 16),
            },
            {"num_warps": num_warps, "maxnreg": registers},
        )
print("KERNEL dequantize")
pointers = {"qweight": "*i32", "qzeros": "*i32", "scales": "*fp16", "weight": "*bf16"}
constants = {"BITS": bits, "SYM": False, "ROWS": 1, "THREADS": _THREADS}
show(_dequantize_kernel, pointers, constants, {"num_warps": _THREADS // 32})
"""


def main_loops(assembly: str) -> list[list[str]]:
    """Instructions of the loops that multiply on the tensor cores."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(instruction[1])
            branch = re.match(r"BRA.*`\((\.L\w+)\)", instruction[1])
            if branch and branch[1] in labels:
                loops.append(instructions[labels[branch[1]] :])
    return [loop for loop in loops if any("MMA." in line for line in loop)]


def main_loop(assembly: str) -> list[str]:
    """Instructions of the innermost of them."""
    return min(main_loops(assembly), key=len)


def overwritten_operands(loop: list[str]) -> list[str]:
    """Instructions that write to a register of an operand while its product may still be under way."""
    under_way: list[tuple[int, set[int]]] = []  # the group of a product, the registers of its left operand
    group, found = 0, []
    for line in loop * 3:
        if product := re.match(r"HGMMA\S* R\d+, R(\d+)", line):
            under_way.append((group, set(range(int(product[1]), int(product[1]) + 4))))
            group += "gsb0" in line
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", line):
            under_way = [(number, registers) for number, registers in under_way if number >= group - int(wait[1], 16)]
        elif (write := re.match(r"(\S+) (?:U?P\w+, )*R(\d+)", line)) and not re.match("ST|LDGSTS|[A-Z]*SETP", line):
            size = 4 if ".128" in write[1] else 2 if re.search(r"\.64|WIDE|CS2R", write[1]) else 1
            written = set(range(int(write[2]), int(write[2]) + size))
            found += [line for _, registers in under_way if registers & written]
    return found


def compiled(script: str, *arguments: object) -> str:
    """What a script prints that compiles for a GPU, while this process interprets kernels."""
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert not run.returncode, run.stderr
    return run.stdout


def compiled_loops(
    capability: int, bits: int, group_size: int, target: Path, experts: int = 0
) -> dict[tuple[int, ...], list[str]]:
    """The main loop for each tile that the product tries: (rows, input features, warps, stages)."""
    printed = compiled(COMPILE, target, DISASSEMBLER, capability, bits, group_size, experts)
    kernels = re.split(r"^KERNEL ", printed, flags=re.MULTILINE)[1:]
    assert len(kernels) > 4
    return {tuple(map(int, kernel.splitlines()[0].split())): main_loop(kernel) for kernel in kernels}


needs_disassembler = pytest.mark.skipif(not DISASSEMBLER.exists(), reason="this Triton has no disassembler")


@needs_disassembler
@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(4, 128), *(pytest.param(bits, size, marks=pytest.mark.slow) for bits in (2, 3, 4, 8) for size in (32, 64, 128))],
)
@pytest.mark.parametrize("experts", [0, 128])
def test_operands_are_safe_in_registers(bits: int, group_size: int, experts: int, tmp_path: Path) -> None:
    for tile, loop in compiled_loops(90, bits, group_size, tmp_path / "kernel", experts).items():
        block_k = tile[1]
        assert sum("HGMMA" in line for line in loop) == block_k // 16, tile
        assert overwritten_operands(loop) == [], tile
        if group_size >= block_k:
            assert not any(line.startswith("STS") for line in loop), tile  # nothing goes through shared memory


@needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ampere_needs_no_shared_memory_for_weights_either(bits: int, tmp_path: Path) -> None:
    for tile, loop in compiled_loops(80, bits, 128, tmp_path / "kernel").items():
        assert any("HMMA" in line for line in loop) and not any(line.startswith("STS") for line in loop), tile


@needs_disassembler
@pytest.mark.parametrize(
    ("capability", "query_rows", "head_dim", "whole"),
    [
        (90, 4, 128, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (80, 4, 128, False),
                (80, 4, 64, False),
                (90, 4, 256, False),
                (80, 128, 64, True),
                (90, 128, 128, True),
                (80, 128, 128, True),
                (80, 128, 256, True),
            ]
        ),
    ],
)
def test_ragged_attention_loads_ahead(
    capability: int, query_rows: int, head_dim: int, whole: bool, tmp_path: Path
) -> None:
    """Entries of the prefix are on their way to shared memory while earlier ones are multiplied."""
    printed = compiled(
        COMPILE_ATTENTION, tmp_path / "kernel", DISASSEMBLER, capability, query_rows, head_dim, int(whole)
    )
    pipelined = [loop for loop in main_loops(printed) if any(line.startswith("LDGSTS") for line in loop)]
    assert pipelined
    for loop in pipelined:
        assert not any(re.match("LDG\\b", line) for line in loop)
        assert all(".128" in line for line in loop if line.startswith("LDGSTS"))  # 16 bytes for each thread
        assert not any(re.match(r"(STL|LDL)\b", line) for line in loop)  # all values stay in registers
    if capability < 90:
        assert int(printed.split()[1]) <= 99 * 1024  # bytes of shared memory, all that some GPUs have for one block


@needs_disassembler
@pytest.mark.parametrize("bits", [3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 4, 8))])
def test_words_for_few_rows_are_loaded_ahead(bits: int, tmp_path: Path) -> None:
    printed = compiled(COMPILE_FEW_ROWS, tmp_path / "kernel", DISASSEMBLER, bits)
    *products, (_, dequantize) = (
        kernel.split("\n", 1) for kernel in re.split(r"^KERNEL ", printed, flags=re.MULTILINE)[1:]
    )
    assert len(products) > 5
    for tile, assembly in products:
        loop = max(main_loops(assembly), key=len)
        places = {name: [i for i, line in enumerate(loop) if name in line] for name in ("CCTL.E.PF2", "LDG.", "HMMA.")}
        assert places["CCTL.E.PF2"] and places["CCTL.E.PF2"][0] < places["LDG."][0] < places["HMMA."][0], tile
        if "16 4 1 128" in tile and bits < 8:  # with enough registers, all loads come first
            assert places["LDG."][-1] < places["HMMA."][0], tile
    assert "STG.E.64" in dequantize and not re.search(r"\b(BAR|STS|LDS)\b", dequantize)


def test_an_overwritten_operand_is_found() -> None:
    product, wait = "HGMMA.64x64x16.F32.BF16 R24, R84, gdesc[UR16], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert overwritten_operands([product, wait, "LDS.128 R84, [R2]"]) == []
    assert set(overwritten_operands([product, "LDS.128 R82, [R2]", wait])) == {"LDS.128 R82, [R2]"}
    assert overwritten_operands([product, wait.replace("0x0", "0x1"), "FADD R87, R1, R2"]) != []
    assert overwritten_operands([product, "ISETP.GE.AND P5, PT, R84, R2, PT", "FADD R88, R84, R2", wait]) == []
