"""torch's int4 kernel for CPUs against the reference, and what is kept for it."""

import gc

import pytest
import torch

from lkq_hf.kernels import int4_cpu
from lkq_hf.kernels.bit_stream import pack
from lkq_hf.kernels.int4_cpu import ROWS, fits_int4, release_repacked
from lkq_hf.kernels.quantized_matmul import (
    quantized_matmul,
    quantized_matmul_reference,
    quantized_matmul_shared,
)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.delenv("LKQ_KERNELS", raising=False)
    release_repacked()


def weight(in_features=256, out_features=96, group_size=64, sym=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32, generator=generator)
    groups = in_features // group_size
    zeros = torch.randint(0, 16, (groups, out_features), dtype=torch.int32, generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) * 0.05 + 0.01).half()
    if sym:
        scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    return pack(integers, 4).t().contiguous(), pack(zeros, 4), scales


def activations(*shape, dtype):
    # A mean far from zero shows what is lost by a zero point that is rounded.
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("shape", [(1, 256), (1, 3, 256), (256,)])
def test_products_are_the_references(sym, group_size, dtype, shape):
    tensors, x = weight(group_size=group_size, sym=sym), activations(*shape, dtype=dtype)
    assert fits_int4(x, 4, group_size)
    y = quantized_matmul(x, *tensors, 4, group_size, sym)
    assert len(int4_cpu._repacked) == 1 and y.dtype == dtype
    exact = quantized_matmul_reference(x.double(), *tensors, 4, group_size, sym)
    assert y.shape == exact.shape

    def error(found):
        return ((found.double() - exact).norm() / exact.norm()).item()

    rounding = error(quantized_matmul_reference(x, *tensors, 4, group_size, sym))
    assert error(y) < (1e-5 if dtype == torch.float32 else 2 * rounding)


def test_shared_products_lie_side_by_side():
    first, second = weight(), weight(out_features=32, seed=1)
    x = activations(1, 256, dtype=torch.bfloat16)
    y = quantized_matmul_shared(x, [*first, *second], 4, 64, False)
    alone = [quantized_matmul(x, *tensors, 4, 64, False) for tensors in (first, second)]
    assert torch.equal(y, torch.cat(alone, -1)) and len(int4_cpu._repacked) == 2


@pytest.mark.parametrize(
    ("x", "bits", "group_size"),
    [
        (activations(1, 256, dtype=torch.bfloat16), 3, 64),
        (activations(1, 256, dtype=torch.bfloat16), 4, 16),
        (activations(1, 256, dtype=torch.float64), 4, 64),
        (activations(ROWS[torch.float32] + 1, 256, dtype=torch.float32), 4, 64),
        (activations(0, 256, dtype=torch.bfloat16), 4, 64),
    ],
)
def test_the_reference_does_the_rest(x, bits, group_size):
    assert not fits_int4(x, bits, group_size)


def test_the_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv("LKQ_KERNELS", "torch")
    quantized_matmul(activations(1, 256, dtype=torch.bfloat16), *weight(), 4, 64, False)
    assert not len(int4_cpu._repacked)


def test_a_weight_is_repacked_once_and_forgotten_with_it(monkeypatch):
    tensors, x = weight(), activations(1, 256, dtype=torch.bfloat16)
    repack, calls = int4_cpu._repack, []
    monkeypatch.setattr(int4_cpu, "_repack", lambda qweight: calls.append(1) or repack(qweight))
    for _ in range(3):
        quantized_matmul(x, *tensors, 4, 64, False)
    quantized_matmul(x.float(), *tensors, 4, 64, False)
    assert len(calls) == 1 and len(int4_cpu._repacked) == 1
    (kept,) = int4_cpu._repacked.values()
    assert kept.weight.nbytes == tensors[0].nbytes
    del tensors, kept
    gc.collect()
    assert not len(int4_cpu._repacked)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_weight_that_is_changed_in_place_is_repacked(changed):
    tensors, x = weight(), activations(1, 256, dtype=torch.float32)
    quantized_matmul(x, *tensors, 4, 64, False)
    tensors[changed].copy_(weight(seed=1)[changed])
    expected = quantized_matmul_reference(x, *tensors, 4, 64, False)
    torch.testing.assert_close(quantized_matmul(x, *tensors, 4, 64, False), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_input():
    tensors, x = weight(), activations(2, 256, dtype=torch.bfloat16).requires_grad_()
    quantized_matmul(x, *tensors, 4, 64, False).sum().backward()
    expected = torch.autograd.grad(quantized_matmul_reference(x, *tensors, 4, 64, False).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)


def test_inside_of_inference_mode():
    with torch.inference_mode():
        tensors, x = weight(), activations(1, 256, dtype=torch.bfloat16)
        y = quantized_matmul(x, *tensors, 4, 64, False)
        expected = quantized_matmul_reference(x, *tensors, 4, 64, False)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.3)
