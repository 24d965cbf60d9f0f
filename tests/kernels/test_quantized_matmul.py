"""Packed weights in matmul and dequantization: Triton (in its interpreter without a GPU) against the reference."""

import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lkq_hf.kernels.bit_stream import pack
from lkq_hf.kernels.dequantize import dequantize, dequantize_reference
from lkq_hf.kernels.dispatch import next_power_of_2
from lkq_hf.kernels.quantized_matmul import (
    Product,
    RepeatedProduct,
    quantized_matmul,
    quantized_matmul_reference,
    quantized_matmul_shared,
    ways_to_multiply,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = (2, 3, 4, 8)
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def triton_kernels(use_kernels: Callable[[str], None]) -> None:
    """On a CPU, the kernels in Triton's interpreter, which would not be chosen there."""
    use_kernels("triton")


needs_triton = pytest.mark.usefixtures("triton_kernels")


def packed(bits: int, group_size: int, sym: bool, in_features: int, out_features: int) -> tuple:
    generator = torch.Generator().manual_seed(bits + in_features + out_features)
    integers = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.int32, generator=generator)
    groups = in_features // group_size
    zeros = torch.randint(0, 2**bits, (groups, out_features), dtype=torch.int32, generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) * 0.05 + 0.01).half()
    if sym:
        # The solver gives symmetric groups scales of either sign.
        scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    tensors = (pack(integers, bits).t().contiguous(), pack(zeros, bits), scales)
    return (*(tensor.to(DEVICE) for tensor in tensors), bits, group_size, sym)


def activations(*shape: int, dtype: torch.dtype) -> Tensor:
    # A mean far from zero: it shows what accumulating offsets of the packed integers would lose.
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 1).to(dtype).to(DEVICE)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_reference_is_the_formula(bits: int, sym: bool) -> None:
    qweight, qzeros, scales, *layout = packed(bits, 64, sym, 128, 32)
    weight = dequantize_reference(qweight, qzeros, scales, *layout, torch.float64)
    stream = lambda words: [  # noqa: E731
        sum(((int(words[(i * bits + b) // 32]) >> ((i * bits + b) % 32)) & 1) << b for b in range(bits))
        for i in range(len(words) * 32 // bits)
    ]
    for column in (0, 10, 21, 31):
        zeros = [2 ** (bits - 1) if sym else stream(row)[column] for row in qzeros.tolist()]
        for k, q in enumerate(stream(qweight[:, column].tolist())):
            expected = scales[k // 64, column].double().item() * (q - zeros[k // 64])
            assert weight[k, column].item() == pytest.approx(expected, rel=1e-6)


@needs_triton
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "group_size", "dtype"),
    [
        (1, 192, 96, 64, torch.float16),
        (1, 192, 96, 64, torch.bfloat16),
        (3, 128, 32, 128, torch.float16),
        (4, 96, 96, 32, torch.bfloat16),
        (8, 192, 96, 64, torch.float16),
        (16, 96, 32, 96, torch.bfloat16),
        (16, 96, 32, 96, torch.float16),
        (20, 128, 32, 64, torch.bfloat16),
        (1, 4096 if DEVICE == "cuda" else 768, 32, 128, torch.float16),
        (40, 256, 64, 128, torch.float16),
    ],
)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_kernels_agree_with_reference(
    bits: int, sym: bool, rows: int, in_features: int, out_features: int, group_size: int, dtype: torch.dtype
) -> None:
    from lkq_hf.kernels.quantized_gemv_triton import chunk_features

    by_dot = rows > 32 or chunk_features(bits, group_size) is None
    if INTERPRETING and dtype == torch.bfloat16 and by_dot:
        pytest.skip("Triton's interpreter takes the bits of bfloat16 operands of tl.dot for integers")
    weight = packed(bits, group_size, sym, in_features, out_features)
    x = activations(rows, in_features, dtype=dtype)
    exact = dequantize_reference(*weight, torch.float64)
    actual = quantized_matmul(x, *weight)
    assert actual.dtype == dtype
    # The tensor cores multiply weights rounded to the activations' dtype; the interpreter cuts bfloat16 off.
    bound = torch.finfo(dtype).eps * (x.double().abs() @ exact.abs()) * 2
    assert ((actual.double() - x.double() @ exact).abs() <= bound).all()


@needs_triton
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_kernel_is_exact(bits: int, sym: bool) -> None:
    weight = packed(bits, 32, sym, 96, 160)
    # The interpreter cuts bfloat16 off instead of rounding it.
    for dtype in (torch.float16, torch.float32, *((torch.bfloat16,) if DEVICE == "cuda" else ())):
        assert torch.equal(dequantize(*weight, dtype), dequantize_reference(*weight, dtype))


@needs_triton
def test_every_candidate_agrees() -> None:
    weight = packed(4, 64, False, 256, 64)
    for rows in (2, 20, 40):
        x = activations(rows, 256, dtype=torch.float16)
        expected = quantized_matmul_reference(x.double(), *weight)
        product = Product(x.dtype, x.device, 4, 64, False, 256, (64,), next_power_of_2(rows))
        candidates, _ = ways_to_multiply(product)
        for candidate in candidates:
            y = candidate(x, *weight[:3])
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=expected.abs().max().item() * 2e-3)


@needs_triton
@pytest.mark.parametrize("group_size", [32, 128])
def test_splits_need_not_share_tiles_evenly(group_size: int) -> None:
    from lkq_hf.kernels.quantized_gemm_triton import QuantizedGemm

    qweight, qzeros, scales, bits, group_size, sym = weight = packed(4, group_size, False, 5 * 128, 64)
    x = activations(40, 5 * 128, dtype=torch.float16)
    expected = quantized_matmul_reference(x.double(), *weight)
    layout = {"bits": bits, "group_size": group_size, "sym": sym}
    tile = {"block_m": 64, "block_k": 128, "num_warps": 4, "num_stages": 3, "ahead": 1}
    for split_k in range(1, 6):
        y = QuantizedGemm(x.device, 5 * 128, 64, **layout, **tile, split_k=split_k)(x, qweight, qzeros, scales)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=expected.abs().max().item() * 2e-3)


@needs_triton
def test_tensors_may_begin_anywhere() -> None:
    """On a GPU, vectors of 16 bytes are loaded; one compiled for tensors that begin at their multiples has run."""
    qweight, qzeros, scales, *layout = packed(4, 64, False, 128, 64)
    x = activations(2, 128, dtype=torch.float16)
    expected = quantized_matmul(x, qweight, qzeros, scales, *layout)
    moved = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, qweight, qzeros, scales)]
    assert all(tensor.data_ptr() % 16 for tensor in moved)
    assert torch.equal(quantized_matmul(*moved, *layout), expected)


def test_kernels_do_not_take_the_bits_of_other_scales_for_float16(use_kernels: Callable[[str], None]) -> None:
    use_kernels("triton")
    qweight, qzeros, scales, *layout = packed(4, 64, False, 128, 64)
    with pytest.raises(RuntimeError, match=r"the kernel does not take torch\.float32"):
        quantized_matmul(activations(2, 128, dtype=torch.float16), qweight, qzeros, scales.float(), *layout)


@pytest.mark.parametrize(("implementation", "dtype"), [("torch", torch.float32), ("triton", torch.float16)])
@pytest.mark.parametrize("bits", [3, 4])
def test_gradient_and_registration(
    bits: int, implementation: str, dtype: torch.dtype, use_kernels: Callable[[str], None]
) -> None:
    use_kernels(implementation)
    weight = packed(bits, 32, False, 64, 32)
    x = torch.randn(2, 3, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    torch.library.opcheck(dequantize, (*weight, dtype))
    torch.library.opcheck(quantized_matmul, (x, *weight))
    grad_output = torch.randn(2, 3, 32, device=DEVICE, dtype=dtype)
    (grad,) = torch.autograd.grad(quantized_matmul(x, *weight), x, grad_output)
    torch.testing.assert_close(grad, grad_output @ dequantize_reference(*weight, dtype).t())


def test_products_with_several_weights() -> None:
    weights = [packed(4, 64, False, 128, out_features) for out_features in (64, 32)]
    tensors = [tensor for weight in weights for tensor in weight[:3]]
    x = activations(2, 3, 128, dtype=torch.float16)
    torch.library.opcheck(quantized_matmul_shared, (x, tensors, 4, 64, False))
    expected = torch.cat([quantized_matmul(x, *weight) for weight in weights], -1)
    torch.testing.assert_close(quantized_matmul_shared(x, tensors, 4, 64, False), expected)


class Operators(TorchDispatchMode):
    """Records the operators of this project that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [function.name()] if function.namespace == "lkq_hf" else []
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("rows", [2, 40])
def test_repeated_products(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qweight, qzeros, scales, *layout = weight = packed(4, 64, False, 128, 64)
    x = activations(rows, 128, dtype=torch.float16)
    expected = quantized_matmul(x, *weight)
    product = RepeatedProduct(*layout)
    weights = [qweight, qzeros, scales]
    assert torch.equal(product(x, weights), expected)
    # From then on nothing asks which kernel is to run.
    with monkeypatch.context() as patch:
        patch.setattr("lkq_hf.kernels.quantized_matmul._product", None)
        assert torch.equal(product(x.view(1, rows, 128), weights), expected[None])
    # But other scales, and a mode that looks at operators, are noticed; and copies choose for themselves.
    with pytest.raises(RuntimeError, match=r"the kernel does not take torch\.float32"):
        product(x, [qweight, qzeros, scales.float()])
    with Operators() as seen:
        assert torch.equal(product(x, weights), expected)
    assert seen.names == ["lkq_hf::quantized_matmul_shared"]
    assert torch.equal(pickle.loads(pickle.dumps(product))(x, weights), expected)
    monkeypatch.setenv("LKQ_KERNELS", "torch")
    torch.testing.assert_close(product(x, weights), quantized_matmul_reference(x, *weight), rtol=0, atol=0.1)
    with monkeypatch.context() as patch:
        patch.setattr("lkq_hf.kernels.quantized_matmul.dequantize", lambda *_: torch.zeros(128, 64, dtype=x.dtype))
        assert not product(x.cpu(), [tensor.cpu() for tensor in weights]).any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_cuda_graph_replays_and_is_deterministic(rows: int) -> None:
    weight = packed(4, 128, False, 1024, 512)
    x = activations(rows, 1024, dtype=torch.bfloat16)
    expected = quantized_matmul(x, *weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = quantized_matmul(x, *weight)
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_products_of_products_in_a_cuda_graph(rows: int) -> None:
    """Kernels that start before the ones ahead of them end wait for what they read."""
    weight = packed(4, 128, False, 4096, 4096)
    x = activations(rows, 4096, dtype=torch.bfloat16)

    def chain(y: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for _ in range(16):
            y = quantized_matmul(torch.nn.functional.rms_norm(y, y.shape[-1:]), *weight)
            results.append(y)
        return results

    expected = [y.clone() for y in chain(x)]
    y = x
    for result in expected:
        reference = quantized_matmul_reference(torch.nn.functional.rms_norm(y, y.shape[-1:]), *weight)
        torch.testing.assert_close(result, reference, rtol=0, atol=reference.abs().max().item() * 0.02)
        y = result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(x)
    for _ in range(20):
        graph.replay()
    assert all(map(torch.equal, results, expected))
