"""Attention over ragged segments against dense attention and a plain copy, on one GPU. Takes less than a minute.

    python benchmarks/ragged_attention.py

Shapes are those of Llama-3.1-8B: 32 heads, 8 KV heads of 128. Data is random and larger than the L2 cache. A result
is checked against the reference before it is timed. Lengths of ragged segments are between 0.2 and 4 times the mean.
"""

import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import L2_BYTES, check, describe, microseconds, parser, save
from tables import RESULTS
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lkq_hf.kernels.decode_attention import decode_attention
from lkq_hf.kernels.ragged_attention import ragged_attention, ragged_attention_reference
from lkq_hf.kernels.ragged_attention_triton import ragged_attention_triton

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
DEVICE = "cuda"
SHORTEST, LONGEST = 0.2, 4.0  # segments, relative to the mean
SLOTS, FILLED = 256, 32  # of the tail of a decode, the rest is room for tokens to come
SCALING = HEAD_DIM**-0.5


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


def check_first(name: str, found: Tensor, inputs: dict[str, Any]) -> None:
    """Compares the first row with the reference: all of them, padded and in float32, would be many GB."""
    first = {key: inputs[key][:1] for key in ("query", "starts", "lengths", "tail_key", "tail_value")}
    if inputs["tail_mask"] is not None:
        first["tail_mask"] = inputs["tail_mask"][:1]
    check(name, found[:1], ragged_attention_reference(**inputs | first))


def prepare_decode(batch: int, mean: int, lengths: Tensor) -> tuple[list[dict[str, Any]], int]:
    """Arguments in several copies, and the bytes that one call reads."""
    size = 2 * HEAD_DIM * DTYPE.itemsize * int(lengths.sum() + FILLED * lengths.numel())
    mask = tail_mask(batch)
    return [ragged_inputs(lengths, mean, 1, SLOTS, mask) for _ in range(number_of_copies(size))], size


def measure_decode(batch: int, mean: int, bandwidth: float) -> dict[str, Any]:
    """One token: microseconds of a call by what runs, and shares of the copy bandwidth."""
    result: dict[str, Any] = {"batch": batch, "mean": mean}
    distributions = {"ragged": ragged_lengths(batch, mean), "uniform": torch.full((batch, KV_HEADS), mean).int()}
    for name, lengths in distributions.items():
        copies, size = prepare_decode(batch, mean, lengths)
        check_first(name, ragged_attention(**copies[0]), copies[0])
        calls: list[Callable[[], object]] = [partial(ragged_attention, **inputs) for inputs in copies]
        result[f"{name}_us"] = microseconds(calls)
        result[f"{name}_share_of_copy_bandwidth"] = size / (result[f"{name}_us"] * 1e-6) / bandwidth
        if name == "ragged":
            result["ragged_without_graph_us"] = microseconds(calls, graph=False)
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


def measure_queries(q: int, batch: int, mean: int) -> dict[str, Any]:
    """Several new tokens, the last ones of the tail: microseconds of a call by what runs."""
    lengths = ragged_lengths(batch, mean)
    inputs = ragged_inputs(lengths, mean, q, q, None)
    result: dict[str, Any] = {"q": q, "batch": batch, "mean": mean}
    check_first("kernel", ragged_attention_triton(**inputs), inputs)
    result["kernel_us"] = microseconds([partial(ragged_attention_triton, **inputs)] * 10)
    key, value = (torch.randn(batch, KV_HEADS, mean + q, HEAD_DIM, dtype=DTYPE, device=DEVICE) for _ in range(2))
    dense = partial(scaled_dot_product_attention, inputs["query"], key, value, scale=SCALING, enable_gqa=True)
    result["dense_us"] = microseconds([dense] * 10)
    return result


def main() -> None:
    options = parser(__doc__, RESULTS / "ragged_attention.json")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    options.add_argument("--means", type=int, nargs="+", default=[256, 1024, 4096], help="entries of a segment")
    options.add_argument("--queries", type=int, nargs="*", default=[4, 16, 64, 256, 1024], help="new tokens")
    given = options.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    results: dict[str, Any] = {"hardware": describe(), "decode": [], "queries": [], "best_tiles": {}}
    bandwidth = results["hardware"]["copy_bandwidth_tb_s"] * 1e12
    for mean, batch in itertools.product(given.means, given.batches):
        results["decode"].append(measure_decode(batch, mean, bandwidth))
        print(results["decode"][-1], flush=True)
    for batch, q in itertools.product((1, 8), given.queries):
        results["queries"].append(measure_queries(q, batch, 1024))
        print(results["queries"][-1], flush=True)
    save(given.out, results | {"seconds": time.perf_counter() - started})


if __name__ == "__main__":
    main()
