"""The column loops of GPTQ and of the descent: Triton (in its interpreter without a GPU) against the reference."""

import os
import subprocess
import sys

import pytest
import torch

from lkq_hf.kernels.descend_columns import descend_columns, descend_columns_reference
from lkq_hf.kernels.round_columns import round_columns, round_columns_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETING,
    reason="needs a GPU or TRITON_INTERPRET=1; test_kernels_in_the_interpreter runs it in a process of its own",
)


@pytest.fixture(autouse=True)
def force_triton(monkeypatch):
    monkeypatch.setenv("LKQ_KERNELS", "triton")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(("columns", "rows"), [(128, 50), (32, 16), (20, 7)])
def test_round_columns_equals_the_reference(bits, columns, rows):
    largest = 2**bits - 1
    block = randn(columns, rows, seed=0)
    block[0] = 1e6  # far outside the grid
    scale = (randn(columns, rows, seed=1).abs() + 0.5) * 4 / largest
    zero = torch.full_like(block, 2 ** (bits - 1))
    unit = torch.triu(randn(columns, columns, seed=2) * 0.1, 1) + torch.eye(columns, device=DEVICE)
    unit[0, 1:] = 0  # its error is too large for the others to stay comparable
    kept = block.clone()
    found = round_columns(block, scale, zero, unit, largest)
    expected = round_columns_reference(block, scale, zero, unit, largest)
    assert torch.equal(block, kept)
    # A value on a rounding boundary may fall to either side, and its row differs from there on.
    same = (found[0] == expected[0]).all(0)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found[1][:, same], expected[1][:, same], rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(("columns", "rows"), [(128, 50), (32, 16), (20, 7)])
def test_descend_columns_equals_the_reference(bits, columns, rows):
    largest = 2**bits - 1
    inputs = randn(3 * columns, columns, seed=3)
    inputs[:, 5] = 0
    hessian = inputs.T @ inputs / len(inputs)
    integers = torch.randint(0, largest + 1, (columns, rows), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    integers = integers.float()
    scale = randn(rows, seed=5).abs() + 0.5
    residual = randn(columns, rows, seed=6)
    found = descend_columns(residual, hessian, integers, scale, largest)
    expected = descend_columns_reference(residual, hessian, integers, scale, largest)
    same = (found[0] == expected[0]).all(0)
    assert same.float().mean() > 0.9 and torch.equal(found[0][5], integers[5])
    assert not torch.equal(found[0], integers)
    torch.testing.assert_close(found[1][:, same], expected[1][:, same], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETING, reason="the tests above ran the kernels")
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-k", "equals_the_reference", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SKIPPED" not in result.stdout
