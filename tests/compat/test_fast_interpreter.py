"""The interpreter of `tests/fast_interpreter.py` computes what Triton's own does, with fewer preparations."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from fast_interpreter import PRIVATE_PARTS  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from lkq_hf.compat import has_part  # noqa: E402

ROWS, COLUMNS = 5, 96

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")


@triton.jit
def _scaled(values, largest):
    return values * tl.exp(values - largest)


@triton.jit
def _sums(values, sums, columns: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        read = tl.load(values + row * columns + start + tl.arange(0, BLOCK))
        total += _scaled(read, tl.max(read, 0))
    tl.store(sums + row, tl.sum(total, 0) + tl.cdiv(columns, BLOCK))


@triton.jit
def _failing():
    tl.static_assert(tl.cdiv(4, 2) == 3, "as it must")


def launch():
    torch.manual_seed(0)
    sums = torch.zeros(ROWS)
    _sums[(ROWS,)](torch.randn(ROWS, COLUMNS), sums, COLUMNS, 16)
    return sums


@pytest.mark.parametrize("part", PRIVATE_PARTS, ids=lambda part: part.partition("(")[0])
def test_a_private_part_of_triton_is_where_it_was(part):
    assert has_part(part)


def test_results_are_the_same_bits(monkeypatch):
    """With fewer replacements: one for the functions above, one for those of Triton's own that they call."""
    replace, replaced = interpreter._patch_builtin, []

    def counted(package, *args):
        replaced.extend([package] if package is tl.core.tensor_descriptor_base else [])  # Comes once in each.
        replace(package, *args)

    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    fast = launch()
    assert len(replaced) == 2
    replaced.clear()
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", interpreter.GridExecutor.__call__.__wrapped__)
    plain = launch()
    assert len(replaced) > 2 * ROWS * COLUMNS // 16
    assert torch.equal(fast, plain)


@triton.jit
def _mixed(a, b, c, d):
    # Whose result depends on the order.
    return a * b.to(a.dtype) + c, tl.where(c > 0, b - d, d * 3)


@triton.jit
def _reduced(values, integers, first, second, AXIS: tl.constexpr):
    place = tl.arange(0, 8)[:, None] * 8 + tl.arange(0, 8)
    both = tl.reduce((tl.load(values + place), tl.load(integers + place)), AXIS, _mixed)
    tl.store(first + tl.arange(0, 8), both[0])
    tl.store(second + tl.arange(0, 8), both[1])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_reduction_by_a_function_of_ones_own_is_the_same(axis, dtype, monkeypatch):
    def reduce():
        torch.manual_seed(0)
        results = torch.empty(8, dtype=dtype), torch.empty(8, dtype=torch.int32)
        _reduced[(1,)](torch.randn(8, 8).to(dtype), torch.randint(-9, 9, (8, 8), dtype=torch.int32), *results, axis)
        return results

    fast = reduce()
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", interpreter.ReduceOps.generic_reduce.__wrapped__)
    assert all(map(torch.equal, fast, reduce()))


@pytest.mark.parametrize(
    "dtype",
    [tl.int1, tl.uint8, tl.int64, tl.float16, tl.bfloat16, tl.pointer_type(tl.float32), tl.block_type(tl.int8, [4])],
    ids=str,
)
def test_a_type_is_that_of_triton(dtype):
    expected = interpreter._get_np_dtype.__wrapped__(dtype)
    assert [interpreter._get_np_dtype(dtype) for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_a_launch_leaves_triton_as_it_was(fails):
    prepare, bool_of_a_tensor, exp = interpreter._patch_lang, tl.tensor.__dict__.get("__bool__"), tl.exp
    if fails:
        with pytest.raises(interpreter.InterpreterError, match="as it must"):
            _failing[(1,)]()
    else:
        launch()
    assert interpreter._patch_lang is prepare
    assert tl.exp is exp and tl.tensor.__dict__.get("__bool__") is bool_of_a_tensor
