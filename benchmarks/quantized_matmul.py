"""Quantized matmul against bfloat16 cuBLAS (and gemlite, humming-kernels, where they are installed) on one GPU.

    python benchmarks/quantized_matmul.py --out benchmarks/results/quantized_matmul.json

Every timing runs in a CUDA graph that goes through several copies of the weight, more than the L2 cache holds. The
copy bandwidth is measured in the same run. Each variant is checked against the reference before it is timed.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from common import L2_BYTES, check, describe, microseconds, parser, save
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lkq_hf.kernels import autotune
from lkq_hf.kernels.bit_stream import pack, unpack
from lkq_hf.kernels.dequantize import dequantize
from lkq_hf.kernels.dispatch import next_power_of_2
from lkq_hf.kernels.quantized_matmul import Product, quantized_matmul, ways_to_multiply

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # out_features, in_features in Llama-3.1-8B
ROWS = (1, 2, 4, 8, 16, 64, 256)
Layer = Callable[[Tensor], Tensor]


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


def gemlite_layers(weight: tuple, count: int, dtype: torch.dtype) -> list[Layer]:
    from gemlite.core import DType, GemLiteLinear

    qweight, qzeros, scales, bits, group_size, sym = weight
    integers = unpack(qweight.t(), bits)
    out_features, in_features = integers.shape
    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    zeros: Tensor | int = 2 ** (bits - 1) if sym else unpack(qzeros, bits).t().contiguous().to(dtype)
    layers = []
    for _ in range(count):
        layer = GemLiteLinear(bits, group_size, in_features, out_features, input_dtype=kind, output_dtype=kind)
        layer.pack(integers.to(torch.uint8), scales.t().contiguous().to(dtype), zeros, None)
        layers.append(layer)
    return layers


def humming_layers(weight: tuple, count: int, dtype: torch.dtype) -> list[Layer]:
    from humming.layer import HummingLayer

    qweight, qzeros, scales, bits, group_size, sym = weight
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": sym}
    tensors = {
        "qweight": qweight,
        "qzeros": qzeros,
        "scales": scales.to(dtype),
        "g_idx": torch.arange(in_features, dtype=torch.int32, device="cuda") // group_size,
    }
    layers = []
    for _ in range(count):
        layer = HummingLayer(
            shape_n=out_features, shape_k=in_features, weight_config=dict(config), torch_dtype=dtype
        ).cuda()
        layer.load_from_tensors(tensors)
        layer.transform()
        layers.append(layer)
    return layers


PEERS = {"gemlite": gemlite_layers, "humming": humming_layers}


def peer_layers(weight: tuple, count: int, x: Tensor, expected: Tensor) -> dict[str, list[Layer]]:
    """The peers that are installed, take this format and compute the right thing; the others say why not."""
    found = {}
    for name, build in PEERS.items():
        if importlib.util.find_spec(name) is None:
            continue
        try:
            layers = build(weight, count, x.dtype)
            # Peers round the scales to the activations' dtype, too.
            check(name, layers[0](x), expected, tolerance=0.05)
        except Exception as error:  # whatever a peer raises, the others are still to be measured
            print(f"{name} W{weight[3]}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        else:
            found[name] = layers
    return found


def measure(
    bits: int, arguments: argparse.Namespace, dtype: torch.dtype, bandwidth: float, shape: tuple[int, int]
) -> list[dict]:
    group_size, sym = arguments.group_size, arguments.sym
    out_features, in_features = shape
    weights = copies(packed_weight(bits, group_size, sym, out_features, in_features))
    quantized_bytes = sum(t.numel() * t.element_size() for t in (weights[0][0], weights[0][2]))
    quantized_bytes += 0 if sym else weights[0][1].numel() * weights[0][1].element_size()
    dense = dequantize(*weights[0], dtype).t().contiguous()
    dense_copies = [dense.clone() for _ in range(max(2, L2_BYTES // (dense.numel() * 2) + 1))]
    peers: dict[str, list[Layer]] | None = None if arguments.peers else {}
    results = []
    for rows in arguments.rows:
        x = torch.randn(rows, in_features, device="cuda", dtype=dtype)
        expected = x.double() @ dense.double().t()
        check("quantized matmul", quantized_matmul(x, *weights[0]), expected)
        if peers is None:
            peers = peer_layers(weights[0], len(weights), x, expected)
        ours = microseconds([partial(quantized_matmul, x, *weight) for weight in weights])
        cublas = microseconds([partial(torch.nn.functional.linear, x, weight) for weight in dense_copies])
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
            "share_of_copy_bandwidth": quantized_bytes / (ours * 1e-6) / bandwidth,
            **{f"{name}_us": microseconds([partial(layer, x) for layer in peers[name]]) for name in peers},
        }
        results.append(result)
        print(result, flush=True)
    return results


def compile_kernels(bits: int, rows: int, group_size: int, sym: bool, dtype: torch.dtype) -> None:
    """Run every candidate once, so that Triton's cache on disk has its kernel. One layer's size serves all others."""
    out_features, in_features = min(SHAPES)
    weight = packed_weight(bits, group_size, sym, out_features, in_features)
    x = torch.randn(rows, in_features, device="cuda", dtype=dtype)
    product = Product(dtype, x.device, bits, group_size, sym, in_features, (out_features,), next_power_of_2(rows))
    candidates, _ = ways_to_multiply(product)
    for candidate in candidates:
        with contextlib.suppress(OutOfResources):
            candidate(x, *weight[:3])


def compile_in_parallel(all_bits: list[int], all_rows: list[int]) -> None:
    """Compilation would be most of the time of this script; processes of their own share it."""
    commands = [
        [sys.executable, *sys.argv, "--compile", str(bits), str(rows)] for bits in all_bits for rows in all_rows
    ]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1)) as pool:
        list(pool.map(partial(subprocess.run, check=True), commands))


def main() -> None:
    options = parser(__doc__, required=False)
    options.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=(2, 3, 4, 8))
    options.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="activation rows")
    options.add_argument("--group-size", type=int, default=128)
    options.add_argument("--sym", action=argparse.BooleanOptionalAction, default=False)
    options.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    options.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--compile", type=int, nargs=2, metavar=("BITS", "ROWS"), help="only compile these kernels")
    given = options.parse_args()
    dtype = getattr(torch, given.dtype)
    if given.compile:
        compile_kernels(*given.compile, given.group_size, given.sym, dtype)
        return
    compile_in_parallel(given.bits, given.rows)
    torch.manual_seed(0)
    hardware = describe()
    results: list[dict] = []
    for bits, shape in itertools.product(given.bits, SHAPES):
        results += measure(bits, given, dtype, hardware["copy_bandwidth_tb_s"] * 1e12, shape)
        choices = {str(key): choice for key, choice in autotune.choices().items()}
        save(given.out, {"hardware": hardware, "results": results, "choices": choices})


if __name__ == "__main__":
    main()
