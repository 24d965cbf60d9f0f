"""Quantised matmul against bfloat16 cuBLAS (and gemlite, humming-kernels, where they are installed) on one GPU.

    python benchmarks/quantized_matmul.py --out benchmarks/results/quantized_matmul.json

Every timing runs in a CUDA graph that goes through several copies of the weight, more than the L2 cache holds. The copy
bandwidth is measured in the same run. Each variant is checked against the reference before it is timed.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from lkq_hf.kernels import autotune
from lkq_hf.kernels.bit_stream import pack
from lkq_hf.kernels.dequantize import dequantize
from lkq_hf.kernels.quantized_matmul import quantized_matmul

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # out_features, in_features in Llama-3.1-8B
ROWS = (1, 2, 4, 8, 16, 64, 256)
L2_BYTES = 256 * 2**20  # what the copies of a weight together exceed: five times the L2 cache of an H200


def microseconds(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median time of one call, with all calls captured in one CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2] * 1e3 / len(calls)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds([lambda: target.copy_(source)] * 4) * 1e-6)


def packed_weight(bits: int, group_size: int, sym: bool, out_features: int, in_features: int) -> tuple:
    integers = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.int32, device="cuda")
    groups = in_features // group_size
    zeros = torch.randint(0, 2**bits, (groups, out_features), dtype=torch.int32, device="cuda")
    scales = torch.rand(groups, out_features, device="cuda") * 0.01 + 0.001
    return pack(integers, bits).t().contiguous(), pack(zeros, bits), scales.half(), bits, group_size, sym


def copies(weight: tuple) -> list[tuple]:
    bytes_of_one = sum(tensor.numel() * tensor.element_size() for tensor in weight[:3])
    count = max(2, min(64, L2_BYTES // bytes_of_one + 1))
    return [(*(tensor.clone() for tensor in weight[:3]), *weight[3:]) for _ in range(count)]


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    if not error < 0.02:
        raise SystemExit(f"{name}: wrong result, largest error {error:.3g} of the largest value")


def gemlite_layers(weight: tuple, dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    from gemlite.core import DType, GemLiteLinear

    qweight, _, scales, bits, group_size, _ = weight
    from lkq_hf.kernels.bit_stream import unpack

    integers = unpack(qweight.t(), bits)
    out_features, in_features = integers.shape
    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    layers = []
    for _ in range(max(2, L2_BYTES // (qweight.numel() * 4) + 1)):
        layer = GemLiteLinear(
            bits, group_size=group_size, in_features=in_features, out_features=out_features, input_dtype=kind, output_dtype=kind
        )
        zeros = torch.full((out_features, in_features // group_size), 2 ** (bits - 1), device="cuda", dtype=dtype)
        layer.pack(integers.to(torch.uint8), scales.t().contiguous().to(dtype), zeros, None)
        layers.append(layer)
    return layers


def measure(bits: int, group_size: int, sym: bool, dtype: torch.dtype, bandwidth: float, peers: bool) -> list[dict]:
    rows_of_results = []
    for out_features, in_features in SHAPES:
        weights = copies(packed_weight(bits, group_size, sym, out_features, in_features))
        quantised_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights[0][: 2 if sym else 3])
        dense = dequantize(*weights[0], dtype)
        dense_copies = [dense.t().contiguous() for _ in range(max(2, L2_BYTES // (dense.numel() * 2) + 1))]
        gemlite = gemlite_layers((*weights[0][:5], True), dtype) if peers and bits != 3 else []
        for rows in ROWS:
            x = torch.randn(rows, in_features, device="cuda", dtype=dtype)
            check("quantised matmul", quantized_matmul(x, *weights[0]), x.double() @ dense.double())
            ours = microseconds([lambda w=w: quantized_matmul(x, *w) for w in weights])
            cublas = microseconds([lambda w=w: torch.nn.functional.linear(x, w) for w in dense_copies])
            result = {
                "bits": bits,
                "group_size": group_size,
                "sym": sym,
                "dtype": str(dtype).removeprefix("torch."),
                "out_features": out_features,
                "in_features": in_features,
                "rows": rows,
                "us": ours,
                "cublas_us": cublas,
                "speedup": cublas / ours,
                "share_of_copy_bandwidth": quantised_bytes / (ours * 1e-6) / bandwidth,
            }
            if gemlite:
                if sym:
                    check("gemlite", gemlite[0](x), x.double() @ dense.double())
                result["gemlite_us"] = microseconds([lambda g=g: g(x) for g in gemlite])
            rows_of_results.append(result)
            peer = f"  gemlite {result['gemlite_us']:7.1f} us" if gemlite else ""
            print(
                f"W{bits} {out_features:>5}x{in_features:<5} M={rows:<4} {ours:7.1f} us  cuBLAS {cublas:7.1f} us  "
                f"x{result['speedup']:4.2f}  {result['share_of_copy_bandwidth']:4.0%} of copy{peer}",
                flush=True,
            )
    return rows_of_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--peers", action="store_true", help="include gemlite (must be installed)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    results = []
    for bits in arguments.bits:
        results += measure(
            bits, arguments.group_size, arguments.sym, getattr(torch, arguments.dtype), bandwidth, arguments.peers
        )
    if arguments.out:
        report = {
            "device": torch.cuda.get_device_name(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
            "copy_bytes_per_second": bandwidth,
            "results": results,
            "choices": [[list(map(str, key)), choice] for key, choice in autotune.choices().items()],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
