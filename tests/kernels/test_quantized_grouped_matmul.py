"""Products with the packed weights of several experts: Triton (in its interpreter without a GPU) and the reference."""

import os
from collections.abc import Callable

import pytest
import torch
from test_quantized_matmul import DEVICE, activations, packed
from torch import Tensor

from lkq_hf.kernels.dequantize import dequantize_reference
from lkq_hf.kernels.quantized_grouped_matmul import (
    quantized_grouped_matmul,
    quantized_grouped_matmul_reference,
    ways_to_multiply_grouped,
)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# An expert without rows at both ends and in the middle, one row, more rows than the smallest tile, and many.
COUNTS = [0, 1, 20, 0, 5, 0]


@pytest.fixture
def triton_kernels(use_kernels: Callable[[str], None]) -> None:
    use_kernels("triton")


needs_triton = pytest.mark.usefixtures("triton_kernels")


def experts(count: int, bits: int, group_size: int, sym: bool, in_features: int, out_features: int) -> tuple:
    """Different weights, stacked."""
    each = [packed(bits, group_size, sym, in_features, out_features)[:3] for _ in range(count)]
    tensors = [torch.stack(kind) for kind in zip(*each, strict=True)]
    tensors[0] = torch.stack([words.roll(index, 1) for index, words in enumerate(tensors[0])])
    return (*tensors, bits, group_size, sym)


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()


def naive(x: Tensor, counts: list[int], weights: tuple) -> Tensor:
    qweight, qzeros, scales, *layout = weights
    return torch.cat([
        rows @ dequantize_reference(qweight[e], qzeros[e], scales[e], *layout, torch.float64)
        for e, rows in enumerate(x.double().split(counts))
    ])  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_reference_multiplies_each_row_with_its_experts_weight(bits: int, sym: bool) -> None:
    weights = experts(6, bits, 32, sym, 64, 96)
    x = activations(sum(COUNTS), 64, dtype=torch.float32)
    expected = naive(x, COUNTS, weights).float()
    for product in (quantized_grouped_matmul_reference, quantized_grouped_matmul):
        torch.testing.assert_close(product(x, ends_of(COUNTS), *weights), expected, rtol=1e-4, atol=1e-3)


@needs_triton
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("in_features", "group_size"), [(128, 64), (256, 128), (96, 32), (96, 96)])
def test_kernel_agrees_with_reference(bits: int, sym: bool, in_features: int, group_size: int) -> None:
    weights = experts(6, bits, group_size, sym, in_features, 96)
    x = activations(sum(COUNTS), in_features, dtype=torch.float16)
    expected = naive(x, COUNTS, weights)
    actual = quantized_grouped_matmul(x, ends_of(COUNTS), *weights)
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=expected.abs().max().item() * 2e-3)


@needs_triton
@pytest.mark.parametrize("counts", [[26, 0, 0], [0, 0, 1], [1, 1, 1], [40, 70, 3]])
def test_every_candidate_agrees(counts: list[int]) -> None:
    weights = experts(3, 4, 64, False, 128, 64)
    x = activations(sum(counts), 128, dtype=torch.float16)
    expected = naive(x, counts, weights)
    for bucket in (16, 128, 4096):
        ways, plain = ways_to_multiply_grouped(4, 64, False, 128, 3, bucket)
        for way in (*ways, plain):
            y = way(x, ends_of(counts), *weights[:3])
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=expected.abs().max().item() * 2e-3)


@needs_triton
def test_rows_of_no_expert_do_not_reach_those_of_others() -> None:
    weights = experts(3, 4, 64, False, 128, 64)
    x = activations(12, 128, dtype=torch.float16)
    counts = [4, 0, 5]
    y = quantized_grouped_matmul(x, ends_of(counts), *weights)
    torch.testing.assert_close(y[:9].double(), naive(x[:9], counts, weights), rtol=0, atol=0.05)
    assert quantized_grouped_matmul(x[:0], ends_of([0, 0, 0]), *weights).shape == (0, 64)


@pytest.mark.parametrize(("implementation", "dtype"), [("torch", torch.float32), ("triton", torch.float16)])
def test_gradient_and_registration(
    implementation: str, dtype: torch.dtype, use_kernels: Callable[[str], None]
) -> None:
    use_kernels(implementation)
    weights = experts(3, 4, 64, False, 128, 64)
    counts = [3, 0, 4]
    x = torch.randn(7, 128, device=DEVICE, dtype=dtype, requires_grad=True)
    torch.library.opcheck(quantized_grouped_matmul, (x, ends_of(counts), *weights))
    grad_output = torch.randn(7, 64, device=DEVICE, dtype=dtype)
    (grad,) = torch.autograd.grad(quantized_grouped_matmul(x, ends_of(counts), *weights), x, grad_output)
    qweight, qzeros, scales, *layout = weights
    dense = [dequantize_reference(qweight[e], qzeros[e], scales[e], *layout, dtype) for e in range(3)]
    expected = torch.cat([rows @ dense[e].t() for e, rows in enumerate(grad_output.split(counts))])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(("fastest", "runs"), [("plain", "first"), (None, "first"), ("second", "second")])
def test_a_graph_is_captured_with_a_kernel(
    fastest: str | None, runs: str, use_kernels: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain way, though it may be the fastest, asks the GPU for the experts' rows."""
    use_kernels("triton")
    ways = {name: lambda x, *_, name=name: name for name in ("first", "second", "plain")}
    module = "lkq_hf.kernels.quantized_grouped_matmul"
    monkeypatch.setattr(f"{module}.interpreting", lambda: False)
    monkeypatch.setattr(
        f"{module}.ways_to_multiply_grouped", lambda *_: ([ways["first"], ways["second"]], ways["plain"])
    )
    monkeypatch.setattr(f"{module}.fastest", lambda *_: ways.get(fastest))
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    product = quantized_grouped_matmul._init_fn
    x, weights = activations(3, 64, dtype=torch.float16), experts(2, 4, 64, False, 64, 32)
    assert product(x, ends_of([1, 2]), *weights) == runs


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [8, 200, 5000])
def test_other_routes_through_a_cuda_graph(rows: int) -> None:
    """A graph that was captured with one division of the rows among experts is right for another one."""
    weights = experts(16, 4, 128, False, 1024, 512)
    x = activations(rows, 1024, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ends = ends_of([rows, *[0] * 15])
    graph = torch.cuda.CUDAGraph()
    quantized_grouped_matmul(x, ends, *weights)
    with torch.cuda.graph(graph):
        y = quantized_grouped_matmul(x, ends, *weights)
    for _ in range(3):
        counts = torch.randint(16, (rows,), generator=generator).bincount(minlength=16).tolist()
        ends.copy_(ends_of(counts))
        graph.replay()
        expected = naive(x, counts, weights)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=expected.abs().max().item() * 0.02)
