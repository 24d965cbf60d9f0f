"""Times the tiles of the kernel behind `lookahead_scores`, for shapes of Llama-3.1-8B and SmolLM2, on one CUDA GPU.

    python benchmarks/score_tiles.py

For each length: the default in one launch and in two, then every tile, fastest first. "alone" has a cold L2 cache and
pays for the start of a graph, "in a row" is one of several calls on different keys in one graph, as layers follow each
other.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from common import L2_BYTES, copy_bandwidth, microseconds
from eviction_overhead import LOOKAHEAD_TOKENS, gpu_microseconds, plain_torch_scores

from lkq_hf.kernels.lookahead_scores_triton import Tile, lookahead_scores_triton

SHAPES = {"8B": (32, 8, 128), "SmolLM2": (9, 3, 64)}  # heads, KV heads, head_dim
LENGTHS = {"8B": (4096, 8192, 32_768), "SmolLM2": (8192,)}


def main() -> None:
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies at {bandwidth / 1e12:.2f} TB/s")
    with torch.inference_mode():
        for name, lengths in LENGTHS.items():
            for length in lengths:
                sweep(name, length, bandwidth)


def sweep(name: str, length: int, bandwidth: float) -> None:
    heads, kv_heads, head_dim = SHAPES[name]
    scaling = head_dim**-0.5
    query = torch.randn(1, heads, LOOKAHEAD_TOKENS, head_dim, device="cuda", dtype=torch.bfloat16)
    total = length + LOOKAHEAD_TOKENS
    key_bytes = 2 * kv_heads * total * head_dim
    keys = [
        torch.randn(1, kv_heads, total, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(2, L2_BYTES // key_bytes))
    ]
    one_read = key_bytes / bandwidth * 1e6
    expected = plain_torch_scores(query, keys[0], scaling)

    def call(key: torch.Tensor, tile: Tile | None, one_launch: bool | None) -> torch.Tensor:
        return lookahead_scores_triton(
            query, key, None, None, None, scaling, None, 1.0, True, tile=tile, one_launch=one_launch
        )[0]

    found: list[tuple[float, float, str]] = []

    def measure(label: str, tile: Tile | None, one_launch: bool) -> None:
        try:
            torch.testing.assert_close(call(keys[0], tile, one_launch), expected, rtol=2e-2, atol=1e-7)
            alone = gpu_microseconds(lambda: call(keys[0], tile, one_launch))
            calls: list[Callable[[], Any]] = [functools.partial(call, key, tile, one_launch) for key in keys]
            found.append((microseconds(calls), alone, label))
        except Exception as error:  # a tile that this GPU cannot hold is left out
            print(f"  {label}: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}")

    measure("default, one launch", None, True)
    measure("default, two launches", None, False)
    for one_launch, rows, keys_of_tile, warps, stages, programs in itertools.product(
        (True, False), (64, 128), (64, 128, 256), (4, 8), (2, 3, 4), (1, 2)
    ):
        threads_fit = programs * rows * keys_of_tile <= 2 * 128 * 128  # logits in registers
        memory_fits = programs * (stages * keys_of_tile + rows) * head_dim * 2 <= 220 * 1024
        if threads_fit and memory_fits and rows * keys_of_tile // (32 * warps) <= 128:
            tile = Tile(rows, keys_of_tile, warps, stages, programs)
            measure(f"{'one launch' if one_launch else 'two launches'} {tuple(tile)}", tile, one_launch)
    print(f"{name}, {length:,} tokens: one read of the keys {one_read:.1f} us; (rows, keys, warps, stages, programs)")
    for place, (in_a_row, alone, label) in enumerate(sorted(found)):
        if place < 12 or label.startswith("default"):
            print(
                f"  {label:44s} alone {alone:6.1f} us ({one_read / alone:4.0%})   "
                f"in a row {in_a_row:6.1f} us ({one_read / in_a_row:4.0%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
