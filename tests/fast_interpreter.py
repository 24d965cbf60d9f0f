"""Triton's interpreter, which prepares `triton.language` once in a launch instead of at every call in it.

A launch in the interpreter replaces the functions of `triton.language` by ones that compute with NumPy, and puts the
former ones back at its end. Whenever the kernel calls another function with ``triton.jit``, as `tl.sum` is one, Triton
replaces them all again, although they are replaced already. That takes up to a millisecond a call, and about half of
the time of the kernels' tests.

Here only the first call into each module replaces them. Outside of launches Triton is as it was.

Two more parts of it are replaced for good, by ones with the same results:

- The NumPy type of a Triton type. Triton makes a table of all types each time that it looks one up.
- `tl.reduce` with a function of the kernel's own. Triton calls the function once for each element. It is one of
  elements, so here it is called once for each slice along the axis.

`tests/compat/test_fast_interpreter.py` compares the results.
"""

import functools
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from lkq_hf.compat import has_part

PRIVATE_PARTS = (
    "triton.runtime.interpreter:GridExecutor.__call__(args_dev, kwargs)",
    "triton.runtime.interpreter:InterpretedFunction.__call__(args, kwargs)",
    "triton.runtime.interpreter:ReduceOps.generic_reduce(input)",
    "triton.runtime.interpreter:ReduceScanOpInterface.to_tensor(ret, dtype)",
    "triton.runtime.interpreter:_get_np_dtype(tt_dtype)",
    "triton.runtime.interpreter:_LangPatchScope.restore",
    "triton.runtime.interpreter:_patch_lang(fn)",
)
"""What this uses of Triton, written as in `lkq_hf.compat.PRIVATE_PARTS`."""


def speed_up() -> None:
    """Makes launches faster from now on. Where Triton's private parts have moved, leaves it as it is."""
    if all(map(has_part, PRIVATE_PARTS)):
        _prepare_once_a_launch()
        _look_types_up_once()
        _reduce_by_slices()


def _prepare_once_a_launch() -> None:
    from triton.runtime import interpreter

    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang

    @functools.wraps(launch)
    def launch_preparing_once(*args: Any, **kwargs: Any) -> None:
        modules = set()

        def prepare_once(fn: FunctionType) -> Any:
            # What is replaced depends only on the names under which the function's module has `triton.language`.
            if id(fn.__globals__) in modules:
                return interpreter._LangPatchScope()  # An empty one: whoever prepared first puts all back.
            modules.add(id(fn.__globals__))
            return prepare(fn)

        interpreter._patch_lang = prepare_once
        try:
            launch(*args, **kwargs)
        finally:
            interpreter._patch_lang = prepare

    interpreter.GridExecutor.__call__ = launch_preparing_once


def _look_types_up_once() -> None:
    from triton.runtime import interpreter

    look_up, found = interpreter._get_np_dtype, {}

    @functools.wraps(look_up)
    def look_up_once(tt_dtype: Any) -> Any:
        if tt_dtype.name not in found:
            found[tt_dtype.name] = look_up(tt_dtype)
        return found[tt_dtype.name]

    interpreter._get_np_dtype = look_up_once


def _reduce_by_slices() -> None:
    from triton.runtime.interpreter import ReduceOps

    reduce = ReduceOps.generic_reduce

    @functools.wraps(reduce)
    def reduce_by_slices(ops: Any, input: Any) -> list:
        values = [tensor.handle.data for tensor in input]
        if ops.axis is None or values[0].ndim == 1 or ops.keep_dims:
            return reduce(ops, input)

        def tensors(arrays: Iterable) -> list:
            return [ops.to_tensor(array, tensor.dtype) for array, tensor in zip(arrays, input, strict=True)]

        total = tensors(value.take(0, ops.axis) for value in values)
        for place in range(1, values[0].shape[ops.axis]):
            result = ops.combine_fn.fn(*total, *tensors(value.take(place, ops.axis) for value in values))
            total = tensors(each.handle.data for each in (result if isinstance(result, tuple) else (result,)))
        return total

    ReduceOps.generic_reduce = reduce_by_slices
