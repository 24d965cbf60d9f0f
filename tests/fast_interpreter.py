"""Triton's interpreter, which prepares `triton.language` once in a launch instead of at every call in it.

A launch in the interpreter replaces the functions of `triton.language` by ones that compute with NumPy, and puts the
former ones back at its end. Whenever the kernel calls another function with ``triton.jit``, as `tl.sum` is one, Triton
replaces them all again, although they are replaced already. That takes up to a millisecond a call, and about half of
the time of the kernels' tests.

Here only the first call into each module replaces them. Outside of launches Triton is as it was.
`tests/compat/test_fast_interpreter.py` compares the results.
"""

import functools
from types import FunctionType
from typing import Any

from lkq_hf.compat import has_part

PRIVATE_PARTS = (
    "triton.runtime.interpreter:GridExecutor.__call__(args_dev, kwargs)",
    "triton.runtime.interpreter:InterpretedFunction.__call__(args, kwargs)",
    "triton.runtime.interpreter:_LangPatchScope.restore",
    "triton.runtime.interpreter:_patch_lang(fn)",
)
"""What this uses of Triton, written as in `lkq_hf.compat.PRIVATE_PARTS`."""


def prepare_once_a_launch() -> None:
    """Makes launches faster from now on. Where Triton's private parts have moved, leaves it as it is."""
    if not all(map(has_part, PRIVATE_PARTS)):
        return
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
