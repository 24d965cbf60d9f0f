"""Attention over ragged segments against dense attention and a plain copy, on one GPU. Takes less than a minute.

    python benchmarks/ragged_attention.py --out benchmarks/results/ragged_attention
    python benchmarks/ragged_attention.py --sweep --out benchmarks/results/ragged_attention_sweep

Writes OUT.json and OUT.md. Shapes are those of Llama-3.1-8B: 32 heads, 8 KV heads of 128. Data is random and larger
than the L2 cache. Every result is checked against the reference before it is timed. Lengths of ragged segments are
between 0.2 and 4 times the mean. ``--sweep`` also times other tiles than the defaults.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import L2_BYTES, describe, microseconds
from tables import table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.errors import OutOfResources

from lkq_hf.kernels.decode_attention import decode_attention
from lkq_hf.kernels.ragged_attention import ragged_attention, ragged_attention_reference
from lkq_hf.kernels.ragged_attention_triton import Tile, default_tile, ragged_attention_triton

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
DEVICE = "cuda"
SHORTEST, LONGEST = 0.2, 4.0  # segments, relative to the mean
SLOTS, FILLED = 256, 32  # of the tail of a decode, the rest is room for tokens to come
SCALING = HEAD_DIM**-0.5
TOLERANCE = 0.02

# Entries, warps, stages; thread blocks per multiprocessor.
DECODE_TILES = list(itertools.product((32, 64, 128), (4, 8), (2, 3, 4)))
DECODE_PROGRAMS = (8, 16, 32, 64)
# Rows, entries, warps, stages.
QUERY_TILES = [
    *itertools.product((32,), (64, 128), (4,), (2, 3)),
    *itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)),
]


def ragged_lengths(batch: int, mean: int) -> Tensor:
    """Random lengths ``[batch, KV_HEADS]`` of about this mean."""
    low, high = math.log(SHORTEST), math.log(LONGEST)
    lengths = torch.exp(torch.rand(batch, KV_HEADS, dtype=torch.float64) * (high - low) + low) * mean
    for _ in range(50):
        lengths = (lengths * (mean / lengths.mean())).clamp(SHORTEST * mean, LONGEST * mean)
    return lengths.int()


def ragged_inputs(lengths: Tensor, mean: int, q: int, slots: int, mask: Tensor | None) -> dict[str, Any]:
    batch = len(lengths)
    total = int(lengths.sum())
    starts = (lengths.flatten().long().cumsum(0) - lengths.flatten()).view_as(lengths)
    random = partial(torch.randn, dtype=DTYPE, device=DEVICE)
    return {
        "query": random(batch, q, HEADS, HEAD_DIM).transpose(1, 2),
        "keys": random(total, HEAD_DIM),
        "values": random(total, HEAD_DIM),
        "starts": starts.to(DEVICE),
        "lengths": lengths.to(DEVICE),
        "longest": int(LONGEST * mean),  # what is known without asking the device
        "tail_key": random(batch, KV_HEADS, slots, HEAD_DIM),
        "tail_value": random(batch, KV_HEADS, slots, HEAD_DIM),
        "tail_mask": mask,
        "scaling": SCALING,
    }


def tail_mask(batch: int) -> Tensor:
    mask = torch.zeros(batch, 1, 1, SLOTS, dtype=torch.bool, device=DEVICE)
    mask[..., :FILLED] = True
    return mask


def number_of_copies(bytes_of_one: int) -> int:
    return max(2, min(64, L2_BYTES // bytes_of_one + 1))


def check(name: str, found: Tensor, inputs: dict[str, Any]) -> None:
    """Compares the first row with the reference: all of them, padded and in float32, would be many GB."""
    first = {key: value[:1] for key, value in inputs.items() if key in ("query", "starts", "lengths")}
    first |= {key: inputs[key][:1] for key in ("tail_key", "tail_value")}
    if inputs["tail_mask"] is not None:
        first["tail_mask"] = inputs["tail_mask"][:1]
    expected = ragged_attention_reference(**inputs | first).double()
    error = ((found[:1].double() - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        raise ValueError(f"{name}: wrong result, largest error {error:.3g} of the largest value")


def prepare_decode(batch: int, mean: int, lengths: Tensor) -> tuple[list[dict[str, Any]], int]:
    """Arguments in several copies, and the bytes that one call reads."""
    size = 2 * HEAD_DIM * DTYPE.itemsize * int(lengths.sum() + FILLED * lengths.numel())
    mask = tail_mask(batch)
    return [ragged_inputs(lengths, mean, 1, SLOTS, mask) for _ in range(number_of_copies(size))], size


def measure_decode(batch: int, mean: int, bandwidth: float, tiles: list[Tile]) -> dict[str, Any]:
    """One token: microseconds of a call by what runs, and shares of the copy bandwidth."""
    result: dict[str, Any] = {"batch": batch, "mean": mean}
    distributions = {"ragged": ragged_lengths(batch, mean), "uniform": torch.full((batch, KV_HEADS), mean).int()}
    for name, lengths in distributions.items():
        copies, size = prepare_decode(batch, mean, lengths)
        check(name, ragged_attention(**copies[0]), copies[0])
        calls: list[Callable[[], object]] = [partial(ragged_attention, **inputs) for inputs in copies]
        result[f"{name}_us"] = microseconds(calls)
        result[f"{name}_share_of_copy_bandwidth"] = size / (result[f"{name}_us"] * 1e-6) / bandwidth
        if name == "ragged":
            result["ragged_without_graph_us"] = microseconds(calls, graph=False)
            result["tiles"] = [
                {**tile._asdict(), "us": timed} for tile in tiles if (timed := tile_time(copies, tile)) is not None
            ]
        del copies, calls

    random = partial(torch.randn, dtype=DTYPE, device=DEVICE)
    mask = torch.cat([torch.ones(batch, 1, 1, mean, dtype=torch.bool, device=DEVICE), tail_mask(batch)], -1)
    shape = (batch, KV_HEADS, mean + SLOTS, HEAD_DIM)
    calls = [
        partial(decode_attention, random(batch, HEADS, 1, HEAD_DIM), random(shape), random(shape), mask, SCALING)
        for _ in range(number_of_copies(size))
    ]
    result["dense_us"] = microseconds(calls)
    result["dense_without_graph_us"] = microseconds(calls, graph=False)
    del calls
    # Reads a half and writes a half: it moves as many bytes as the others read.
    halves = [
        (
            torch.empty(size // 2, dtype=torch.uint8, device=DEVICE),
            torch.empty(size // 2, dtype=torch.uint8, device=DEVICE),
        )
        for _ in range(number_of_copies(size))
    ]
    result["copy_us"] = microseconds([partial(target.copy_, source) for target, source in halves])
    return result


def tile_time(copies: list[dict[str, Any]], tile: Tile) -> float | None:
    """None if the tile needs more than the GPU has."""
    with contextlib.suppress(OutOfResources):
        check(str(tile), ragged_attention_triton(**copies[0], tile=tile), copies[0])
        return microseconds([partial(ragged_attention_triton, **inputs, tile=tile) for inputs in copies])
    return None


def measure_queries(q: int, batch: int, mean: int, tiles: list[Tile]) -> dict[str, Any]:
    """Several new tokens, the last ones of the tail: microseconds of a call by what runs."""
    lengths = ragged_lengths(batch, mean)
    inputs = ragged_inputs(lengths, mean, q, q, None)
    result: dict[str, Any] = {"q": q, "batch": batch, "mean": mean}
    check("kernel", ragged_attention_triton(**inputs), inputs)
    result["kernel_us"] = microseconds([partial(ragged_attention_triton, **inputs)] * 10)
    result["tiles"] = [
        {**tile._asdict(), "us": timed} for tile in tiles if (timed := tile_time([inputs] * 10, tile)) is not None
    ]
    key, value = (torch.randn(batch, KV_HEADS, mean + q, HEAD_DIM, dtype=DTYPE, device=DEVICE) for _ in range(2))
    dense = partial(scaled_dot_product_attention, inputs["query"], key, value, scale=SCALING, enable_gqa=True)
    result["dense_us"] = microseconds([dense] * 10)
    return result


def decode_tiles() -> list[Tile]:
    return [Tile(16, *tile, programs) for tile in DECODE_TILES for programs in DECODE_PROGRAMS]


def query_tiles(q: int) -> list[Tile]:
    default = default_tile(q * HEADS // KV_HEADS, HEAD_DIM, DTYPE.itemsize)
    return [Tile(*tile, default.programs) for tile in QUERY_TILES]


def compile_share(part: int, parts: int) -> None:
    """Runs every so many tiles once, so that Triton's cache on disk has their kernels."""
    decode = ragged_inputs(ragged_lengths(1, 256), 256, 1, SLOTS, tail_mask(1))
    # With chunks and without.
    queries = {q: ragged_inputs(ragged_lengths(2, 256), 256, q, q, None) for q in (16, 1024)}
    jobs = [(decode, Tile(16, *tile, DECODE_PROGRAMS[0])) for tile in DECODE_TILES]
    jobs += [(inputs, tile) for q, inputs in queries.items() for tile in query_tiles(q)]
    for inputs, tile in jobs[part::parts]:
        with contextlib.suppress(OutOfResources):
            ragged_attention_triton(**inputs, tile=tile)


def compile_in_parallel() -> None:
    parts = max(1, len(os.sched_getaffinity(0)) - 1)
    processes = [
        subprocess.Popen([sys.executable, *sys.argv, "--compile", str(part), str(parts)]) for part in range(parts)
    ]
    for process in processes:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def best_tiles(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tiles that fit everywhere, by their mean slowdown over the fastest tile of each row (geometric)."""
    slowdowns: dict[tuple[int, ...], list[float]] = {}
    for row in rows:
        fastest = min(tile["us"] for tile in row["tiles"])
        for tile in row["tiles"]:
            slowdowns.setdefault(tuple(tile[name] for name in Tile._fields), []).append(tile["us"] / fastest)
    everywhere = {tile: found for tile, found in slowdowns.items() if len(found) == len(rows)}
    ranked = sorted((math.exp(sum(map(math.log, found)) / len(found)), tile) for tile, found in everywhere.items())
    return [{**Tile(*tile)._asdict(), "slowdown": slowdown} for slowdown, tile in ranked]


def page(results: dict[str, Any]) -> str:
    hardware = results["hardware"]
    parts = [
        "# Attention over ragged segments",
        f"{hardware['gpu']}, copy bandwidth {hardware['copy_bandwidth_tb_s']} TB/s; "
        + ", ".join(f"{name} {version}" for name, version in hardware["versions"].items())
        + ". `python benchmarks/ragged_attention.py`",
        "Microseconds of one call in a CUDA graph: one token, Llama-3.1-8B's heads, bfloat16. Dense attention reads "
        "the same number of entries for each head, a copy moves the bytes that the ragged kernel reads. Shares are of "
        "the copy bandwidth.",
        table(
            ["batch", "mean entries", "ragged", "uniform", "dense", "copy", "ragged, share", "without a graph"],
            [
                [
                    str(row["batch"]),
                    str(row["mean"]),
                    *(f"{row[f'{name}_us']:.1f}" for name in ("ragged", "uniform", "dense", "copy")),
                    f"{row['ragged_share_of_copy_bandwidth']:.0%}",
                    f"{row['ragged_without_graph_us']:.1f}",
                ]
                for row in results["decode"]
            ],
        ),
        "Several new tokens, mean entries as above plus the tokens themselves: the kernel, and "
        "`scaled_dot_product_attention` without a mask over dense tensors of the same mean.",
        table(
            ["tokens", "batch", "mean entries", "kernel", "dense"],
            [
                [
                    *(str(row[name]) for name in ("q", "batch", "mean")),
                    *(f"{row[f'{name}_us']:.1f}" for name in ("kernel", "dense")),
                ]
                for row in results["queries"]
            ],
        ),
    ]
    for name, ranked in results["best_tiles"].items():
        parts += [
            f"Tiles for {name}: time relative to the fastest of each row, geometric mean.",
            table(
                [*Tile._fields, "slowdown"],
                [[*(str(tile[field]) for field in Tile._fields), f"{tile['slowdown']:.3f}"] for tile in ranked[:10]],
            ),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--means", type=int, nargs="+", default=[256, 1024, 4096], help="entries of a segment")
    parser.add_argument("--queries", type=int, nargs="*", default=[4, 16, 64, 256, 1024], help="new tokens")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, too")
    parser.add_argument("--out", type=Path, help="where to write, without extension")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("PART", "PARTS"), help="only compile these kernels")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.compile:
        compile_share(*arguments.compile)
        return
    started = time.perf_counter()
    if arguments.sweep:
        compile_in_parallel()
        print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
    results: dict[str, Any] = {"hardware": describe(), "decode": [], "queries": [], "best_tiles": {}}
    bandwidth = results["hardware"]["copy_bandwidth_tb_s"] * 1e12
    for mean, batch in itertools.product(arguments.means, arguments.batches):
        row = measure_decode(batch, mean, bandwidth, decode_tiles() if arguments.sweep else [])
        results["decode"].append(row)
        print({name: value for name, value in row.items() if name != "tiles"}, flush=True)
    for batch, q in itertools.product((1, 8), arguments.queries):
        row = measure_queries(q, batch, 1024, query_tiles(q) if arguments.sweep else [])
        results["queries"].append(row)
        print({name: value for name, value in row.items() if name != "tiles"}, flush=True)
    if arguments.sweep:
        results["best_tiles"] = {"one token": best_tiles(results["decode"])} | {
            f"{q} tokens": best_tiles([row for row in results["queries"] if row["q"] == q]) for q in arguments.queries
        }
    results["seconds"] = time.perf_counter() - started
    text = page(results)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
