"""What a packed Linear costs the host, called without compiling, against one in bfloat16.

    python benchmarks/host_time.py --out host_time.json     # on one CUDA GPU

Microseconds from one call to the next while the GPU is faster than the host, for the layers of Llama-3.1-8B that share
an input, and for one row. ``stubbed`` is without the launches themselves: what Python does around them. Without a GPU
it is the only figure, of kernels that are not there.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from common import DEVICE, describe, parser, save, synchronize
from tables import table
from torch import nn

from lkq_hf.kernels import autotune, dispatch
from lkq_hf.kernels.launch import RepeatedLaunch
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.shared_input import share_inputs

LAYERS = {
    "q_proj, k_proj, v_proj": (4096, {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}),
    "o_proj": (4096, {"o_proj": 4096}),
    "gate_proj, up_proj": (4096, {"gate_proj": 14336, "up_proj": 14336}),
    "down_proj": (14336, {"down_proj": 4096}),
}
CALLS = 200


def packed(in_features: int, out_features: int, bits: int) -> QuantizedLinear:
    layer = QuantizedLinear(in_features, out_features, bits=bits, group_size=128, sym=False, device=DEVICE)
    for name, buffer in layer.named_buffers():
        if name == "scales":
            buffer.uniform_(0.001, 0.011)
        else:
            buffer.random_(0, 2**31 - 1)
    return layer


def host_microseconds(run: Callable[[], object], repeats: int) -> float:
    """The fastest of several runs: the others were interrupted."""
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        times.append((time.perf_counter() - start) / CALLS)
    return 1e6 * min(times)


class Nothing:
    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_: None


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Kernels that do nothing, also where there is no GPU."""

    def launch(self: RepeatedLaunch, grid: tuple[int, int, int], *arguments: Any) -> None:
        Nothing()[grid](*arguments, *self._values)

    patches = [
        patch.object(RepeatedLaunch, "__call__", launch),
        patch.object(RepeatedLaunch, "takes_addresses", True),
    ]
    if DEVICE == "cpu":
        patches += [
            patch.object(dispatch, "_obstacle", lambda *_: None),
            patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "triton"}),
            patch.object(autotune, "fastest", lambda key, candidates, plain: candidates[0]),
            patch("lkq_hf.kernels.quantized_matmul.fastest", lambda key, candidates, plain: candidates[0]),
        ]
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    in_features, widths = LAYERS[name]
    x = torch.randn(1, 1, in_features, device=DEVICE, dtype=torch.bfloat16)
    dense, quantized = nn.Module(), nn.Module()
    for layer, width in widths.items():
        dense.add_module(layer, nn.Linear(in_features, width, bias=False, device=DEVICE, dtype=torch.bfloat16))
        quantized.add_module(layer, packed(in_features, width, arguments.bits))
    share_inputs(quantized)

    def run(module: nn.Module) -> None:
        for layer in module.children():
            layer(x)

    found: dict[str, Any] = {"layers": name}
    if DEVICE == "cuda":
        for kind, module in (("bfloat16", dense), ("packed", quantized)):
            for _ in range(3):
                run(module)  # which chooses kernels
            found[kind] = host_microseconds(lambda: run(module), arguments.repeats)  # noqa: B023
    with stubbed():
        for _ in range(3):
            run(quantized)
        found["packed, stubbed"] = host_microseconds(lambda: run(quantized), arguments.repeats)
    return found


@torch.no_grad()
def main() -> None:
    options = parser(__doc__, required=False)
    options.add_argument("--bits", type=int, default=4)
    options.add_argument("--repeats", type=int, default=10)
    arguments = options.parse_args()
    results = [measure(name, arguments) for name in LAYERS]
    columns = list(results[0])
    print(table(columns, [[str(r["layers"]), *(f"{r[c]:.1f}" for c in columns[1:])] for r in results]))
    save(arguments.out, {"hardware": describe(), "results": results})


if __name__ == "__main__":
    main()
