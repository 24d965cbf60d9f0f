"""Every tile that may be worth a place among the ones that quantized products choose from, on one GPU.

    python benchmarks/product_tiles.py --out product_tiles.json

For each bits, shape and number of rows: microseconds of every tile, of bfloat16 cuBLAS, and of cuBLAS after
dequantizing. Each result is checked first. Two times are taken in a CUDA graph, with weights from memory: ``us`` of
one product after the other, and ``apart_us`` with a small kernel after each, as in models. A tile that the GPU cannot
run or whose result is wrong says so.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from common import L2_BYTES, check, describe, microseconds, parser, save
from quantized_matmul import SHAPES, copies, packed_weight
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lkq_hf.kernels.dequantize import dequantize
from lkq_hf.kernels.dispatch import next_power_of_2
from lkq_hf.kernels.quantized_matmul import GemmTile, GemvTile, Product, Way, gemm, gemv, ways_to_multiply

FAILED = "failed"
ROWS = (1, 256, 64, 32, 128, 16, 8)
# The fields of GemvTile and GemmTile.
FEW_ROWS = {
    16: (
        (4, 1, 128, 2, 4), (4, 1, 128, 4, 4), (4, 1, 128, 2, 5), (4, 1, 128, 4, 5), (4, 1, 64, 2, 4),
        (4, 1, 64, 2, 8), (4, 1, 168, 1, 4), (8, 1, 64, 2, 1), (8, 1, 64, 2, 2), (8, 1, 128, 2, 1),
        (8, 1, 128, 2, 2), (16, 1, 128, 2, 1), (16, 1, 64, 2, 1), (4, 2, 168, 4, 2), (4, 2, 128, 2, 3),
        (4, 2, 168, 2, 3), (8, 2, 128, 4, 2), (8, 2, 255, 4, 1),
    ),
    32: ((4, 1, 255, 2, 2), (4, 1, 168, 2, 2), (8, 1, 255, 2, 1), (4, 1, 128, 2, 4)),
}  # fmt: skip
MANY_ROWS = {
    32: (
        (32, 128, 4, 3, 4, 3), (32, 128, 4, 4, 4, 2), (32, 128, 4, 4, 4, 3), (32, 128, 8, 4, 4, 1),
        (32, 128, 8, 4, 0, 1), (32, 128, 8, 4, 4, 2), (32, 128, 16, 4, 4, 1), (32, 64, 8, 6, 4, 2),
    ),
    64: (
        (64, 128, 4, 5, 4, 2), (64, 128, 4, 3, 4, 3), (64, 128, 8, 3, 4, 1), (64, 128, 8, 5, 4, 1),
        (64, 128, 8, 5, 0, 1), (64, 128, 8, 5, 8, 1), (64, 128, 8, 3, 4, 2), (64, 128, 16, 4, 4, 1),
        (64, 64, 8, 5, 4, 2), (64, 128, 4, 5, 4, 1),
    ),
    128: (
        (128, 128, 4, 3, 4, 2), (128, 128, 4, 4, 4, 1), (128, 128, 8, 4, 4, 1), (128, 64, 16, 4, 4, 1),
        (128, 64, 8, 5, 4, 1), (64, 128, 16, 4, 4, 1), (128, 64, 8, 3, 4, 2), (128, 64, 16, 3, 4, 0.5),
        (64, 128, 8, 4, 4, 2),
    ),
    256: (
        (256, 128, 8, 3, 4, 1), (256, 128, 8, 3, 0, 1), (256, 64, 4, 3, 4, 2), (128, 128, 4, 4, 4, 1),
        (256, 128, 4, 3, 4, 1), (128, 128, 8, 4, 4, 1), (256, 128, 8, 3, 4, 0.5),
    ),
}  # fmt: skip


def tiles_for(rows: int) -> list[GemvTile | GemmTile]:
    few, many = ([table[most] for most in table if rows <= most][:1] for table in (FEW_ROWS, MANY_ROWS))
    return [
        *(GemvTile(*tile) for tiles in few for tile in tiles),
        *(GemmTile(*tile) for tiles in many for tile in tiles if rows > 16),
    ]


def way(product: Product, tile: GemvTile | GemmTile) -> Way | None:
    return gemv(product, tile) if isinstance(tile, GemvTile) else gemm(product, tile)


def product_of(bits: int, shape: tuple[int, int], rows: int, arguments: argparse.Namespace) -> Product:
    out_features, in_features = shape
    device = torch.device("cuda", torch.cuda.current_device())
    return Product(
        torch.bfloat16, device, bits, arguments.group_size, arguments.sym, in_features, (out_features,),
        next_power_of_2(rows),
    )  # fmt: skip


def compile_tiles(arguments: argparse.Namespace) -> None:
    """Run a part of the tiles once, so that Triton's cache on disk has their kernels; print those that do not run."""
    part, parts = arguments.compile
    everything = [(bits, rows, tile) for rows in arguments.rows for bits in arguments.bits for tile in tiles_for(rows)]
    for bits, rows, tile in everything[part::parts]:
        # Whether the L2 cache fetches ahead inside of the loop depends on the layer's size.
        for shape in SHAPES if isinstance(tile, GemvTile) else SHAPES[:1]:
            try:
                weight = packed_weight(bits, arguments.group_size, arguments.sym, *shape)
                x = torch.zeros(rows, shape[1], device="cuda", dtype=torch.bfloat16)
                run = way(product_of(bits, shape, rows, arguments), tile)
                if run is not None:
                    run(x, *weight[:3])
                torch.cuda.synchronize()
            except Exception as error:  # of whatever kind: the others are still to be measured
                print(f"{FAILED} {bits} {rows} {tuple(tile)}", flush=True)
                print(f"W{bits}, {rows} rows, {tile}: {error!r:.300}", file=sys.stderr, flush=True)
                break


def compile_in_parallel() -> set[str]:
    """Returns the tiles that do not run."""
    parts = max(1, len(os.sched_getaffinity(0)) - 1)
    commands = [[sys.executable, *sys.argv, "--compile", str(part), str(parts)] for part in range(parts)]
    with ThreadPoolExecutor(parts) as pool:
        runs = list(pool.map(partial(subprocess.run, stdout=subprocess.PIPE, text=True), commands))
    return {line for run in runs for line in run.stdout.splitlines() if line.startswith(FAILED)}


def times(call: Callable[..., Any], inputs: list[tuple[Tensor, ...]]) -> dict[str, float]:
    between = torch.empty(4096, device="cuda")

    def apart(*tensors: Tensor) -> None:
        call(*tensors)
        between.zero_()

    alone, with_another = (microseconds([partial(each, *tensors) for tensors in inputs]) for each in (call, apart))
    return {"us": round(alone, 2), "apart_us": round(with_another, 2)}


def measure(
    bits: int, shape: tuple[int, int], rows: int, failed: set[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    torch.manual_seed(0)
    weights = copies(packed_weight(bits, arguments.group_size, arguments.sym, *shape))
    layout = weights[0][3:]
    dense = dequantize(*weights[0], torch.bfloat16)
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ dense.double()
    stored = dense.t().contiguous()  # as a Linear stores it
    dense_copies = [(stored.clone(),) for _ in range(max(2, L2_BYTES // (stored.numel() * 2) + 1))]
    packed = [weight[:3] for weight in weights]
    found: dict[str, Any] = {
        "bits": bits, "out_features": shape[0], "in_features": shape[1], "rows": rows,
        "bfloat16": times(partial(torch.nn.functional.linear, x), dense_copies),
        "dequantized": times(lambda *weight: x @ dequantize(*weight, *layout, torch.bfloat16), packed),
        "dequantize": times(lambda *weight: dequantize(*weight, *layout, torch.bfloat16), packed),
        "tiles": {},
    }  # fmt: skip
    del dense_copies
    product = product_of(bits, shape, rows, arguments)
    chosen = ways_to_multiply(product)[0] if arguments.chosen else []
    tiles = [] if chosen else [t for t in tiles_for(rows) if f"{FAILED} {bits} {rows} {tuple(t)}" not in failed]
    ways = {str(tuple(tile)): way(product, tile) for tile in tiles}
    ways |= {f"chosen from {index}": each for index, each in enumerate(chosen)}
    for name, run in ways.items():
        if run is None:
            continue
        try:
            check(name, run(x, *packed[0]), expected)
            found["tiles"][name] = times(partial(run, x), packed)
        except (OutOfResources, ValueError) as error:
            found["tiles"][name] = {"error": str(error)}
    right = {name: each for name, each in found["tiles"].items() if "us" in each}
    best = min(right, key=lambda name: right[name]["apart_us"])
    found["best"] = {
        "tile": best,
        **right[best],
        "times_bfloat16": round(found["bfloat16"]["us"] / right[best]["us"], 2),
    }
    return found


def main() -> None:
    options = parser(__doc__, required=False)
    options.add_argument("--bits", type=int, nargs="+", default=[3, 2, 4], choices=(2, 3, 4, 8))
    options.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    options.add_argument("--group-size", type=int, default=128)
    options.add_argument("--sym", action=argparse.BooleanOptionalAction, default=False)
    options.add_argument("--chosen", action="store_true", help="only the tiles that products choose from")
    options.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this long")
    options.add_argument("--compile", type=int, nargs=2, metavar=("PART", "PARTS"), help="only compile a part")
    arguments = options.parse_args()
    if arguments.compile:
        compile_tiles(arguments)
        return
    began = time.monotonic()
    failed = set() if arguments.chosen else compile_in_parallel()
    compiled = time.monotonic() - began
    print(f"compiled in {compiled:.0f} s", flush=True)
    results: list[dict[str, Any]] = []
    found = {"hardware": describe(), "compile_seconds": round(compiled), "results": results}
    for rows, bits, shape in itertools.product(arguments.rows, arguments.bits, SHAPES):
        if time.monotonic() - began > arguments.seconds:
            print("out of time", flush=True)
            break
        result = measure(bits, shape, rows, failed, arguments)
        results.append(result)
        best, dense = result["best"], result["bfloat16"]
        print(
            f"W{bits} {shape[0]:>5} x {shape[1]:<5} {rows:>3} rows: {best['us']:6.2f} ({best['apart_us']:6.2f} apart) "
            f"bf16 {dense['us']:6.2f} ({dense['apart_us']:6.2f})  {best['times_bfloat16']:.2f} x  {best['tile']}",
            flush=True,
        )
        save(arguments.out, json.loads(json.dumps(found)))


if __name__ == "__main__":
    main()
