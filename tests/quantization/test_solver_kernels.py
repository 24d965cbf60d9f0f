"""The solvers' kernels: Triton (in its interpreter without a GPU) against the references."""

import os
import subprocess
import sys

import pytest
import torch

from lkq_hf.kernels.descend_columns import descend_columns, descend_columns_reference
from lkq_hf.kernels.group_quadratic import group_quadratic, group_quadratic_reference
from lkq_hf.kernels.round_columns import round_columns, round_columns_reference
from lkq_hf.quantization import TwoStageGPTQConfig
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.solve import quantize_weight
from lkq_hf.quantization.stage1 import search_scales

pytestmark = pytest.mark.one_version

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def force_triton(monkeypatch):
    """On a CPU, the kernels in Triton's interpreter, which would not be chosen there."""
    pytest.importorskip("triton")
    monkeypatch.setenv("LKQ_KERNELS", "triton")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(("columns", "rows"), [(128, 50), (32, 16), (20, 7)])
def test_round_columns_equals_the_reference(bits, columns, rows):
    largest = 2**bits - 1
    block = randn(2, columns, rows, seed=0)
    block[:, 0] = 1e6  # far outside the grid
    scale = (randn(2, columns, rows, seed=1).abs() + 0.5) * 4 / largest
    zero = torch.full_like(block, 2 ** (bits - 1))
    unit = torch.triu(randn(2, columns, columns, seed=2) * 0.1, 1) + torch.eye(columns, device=DEVICE)
    unit[:, 0, 1:] = 0  # its error is too large for the others to stay comparable
    kept = block.clone()
    found = round_columns(*(t.mT.contiguous().mT for t in (block, scale, zero, unit)), largest)
    expected = round_columns_reference(block, scale, zero, unit, largest)
    assert torch.equal(block, kept)
    # A value on a rounding boundary may fall to either side, and its row differs from there on.
    same = (found[0] == expected[0]).all(1)
    assert same.float().mean() > 0.9 and not torch.equal(found[0][0], found[0][1])
    torch.testing.assert_close(found[1].mT[same], expected[1].mT[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(("columns", "rows"), [(128, 50), (32, 16), (20, 7)])
def test_descend_columns_equals_the_reference(bits, columns, rows):
    largest = 2**bits - 1
    inputs = randn(2, 3 * columns, columns, seed=3)
    inputs[:, :, 5] = 0
    hessian = inputs.mT @ inputs / inputs.shape[1]
    integers = torch.randint(0, largest + 1, (2, columns, rows), generator=torch.Generator().manual_seed(4))
    integers = integers.float().to(DEVICE)
    scale = randn(2, rows, seed=5).abs() + 0.5
    residual = randn(2, columns, rows, seed=6)
    transposed = (t.mT.contiguous().mT for t in (residual, hessian, integers))  # any strides will do
    found = descend_columns(*transposed, scale.repeat_interleave(2, 1)[:, ::2], largest)
    expected = descend_columns_reference(residual, hessian, integers, scale, largest)
    same = (found[0] == expected[0]).all(1)
    assert same.float().mean() > 0.9 and torch.equal(found[0][:, 5], integers[:, 5])
    assert not (found[0] == integers).all(2).all(1).any()
    torch.testing.assert_close(found[1].mT[same], expected[1].mT[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_search_scales_equals_the_reference(group_size, bits, sym, monkeypatch):
    weight = randn(2, 70, 2 * group_size, seed=7) * 0.02
    weight[1, 3] = 0
    inputs = randn(2, 4 * group_size, 2 * group_size, seed=8) @ randn(2, 2 * group_size, 2 * group_size, seed=9)
    hessian = inputs.mT @ inputs / inputs.shape[1]
    scales, zeros = search_scales(weight, bits, group_size, sym, hessian)
    monkeypatch.setenv("LKQ_KERNELS", "torch")
    expected_scales, expected_zeros = search_scales(weight, bits, group_size, sym, hessian)
    # Candidates of nearly the same loss may change places.
    assert ((scales == expected_scales) & (zeros == expected_zeros)).float().mean() > 0.98
    torch.testing.assert_close(scales, expected_scales, rtol=0.5, atol=0)


COMPILE_SEARCH = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lkq_hf.kernels.search_scales_triton import _search_kernel as kernel

constants = {"SYM": True, "COARSE": 17, "FINE": 4, "GROUP": 32, "ROWS": 64}
kinds = {"largest": "fp32", "smallest_shrink": "fp32", "coarse_step": "fp32", "rows": "i32", "columns": "i32"}
signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
print(compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32)).asm["ttir"])
"""


def test_the_compiled_search_carries_the_coarse_winner_through_its_loop():
    """The interpreter runs a kernel as Python; the compiler once took two names of one tensor for one variable."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE_SEARCH]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loop = next(line for line in result.stdout.splitlines() if " scf.for " in line)
    # The best loss, its scale, zero point and range, and the best range of the coarse search.
    assert ":5 = scf.for" in loop


@pytest.mark.parametrize(("rows", "groups", "group_size"), [(70, 3, 32), (5, 1, 64), (64, 2, 128)])
def test_group_quadratic_equals_the_reference(rows, groups, group_size):
    levels = randn(2, rows, groups, group_size, seed=10).mul(60).round()
    inputs = randn(2, 2 * groups * group_size, groups * group_size, seed=11)
    hessian = inputs.mT @ inputs / inputs.shape[1]
    found = group_quadratic(levels, hessian)
    expected = group_quadratic_reference(levels.double(), hessian.double())
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_precision_inputs_are_those_of_float32(dtype):
    moments, exact = InputMoments(256, DEVICE), InputMoments(256, DEVICE)
    for seed in (12, 14):
        x_tilde = randn(3, 700, 256, seed=seed).to(dtype)
        x = (x_tilde.float() + 0.05 * randn(3, 700, 256, seed=seed + 1)).to(dtype)
        moments.add(x_tilde, x)
        exact.add(x_tilde.float(), x.float())
    for found, expected in ((moments.hessian, exact.hessian), (moments.deviation, exact.deviation)):
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"preset": "paper"}, {"advanced": {"column_order": "stored"}, "sym": True}])
def test_a_solved_layer_equals_the_reference(changes, monkeypatch):
    """Of several groups: kernels take for granted how their inputs lie in memory."""
    weight, x = randn(32, 64, seed=8), randn(400, 64, seed=9) @ randn(64, 64, seed=10) / 10
    moments = InputMoments(64, DEVICE)
    moments.add(x, x + 0.1)
    settings = TwoStageGPTQConfig(**{"bits": 4, "group_size": 32, "sym": False} | changes).solver_settings()
    found = quantize_weight(weight, moments, settings)
    monkeypatch.setenv("LKQ_KERNELS", "torch")
    expected = quantize_weight(weight, moments, settings)
    assert found.losses.keys() == expected.losses.keys()
    for step, losses in expected.losses.items():
        assert float(found.losses[step].sum()) == pytest.approx(float(losses.sum()), rel=0.02), step
    assert (found.weight.integers == expected.weight.integers).float().mean() > 0.98
