"""Choose between an operation's torch reference and its Triton kernel."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ENVIRONMENT_VARIABLE = "LKQ_KERNELS"
"""``torch`` or ``triton`` forces that implementation everywhere; unset or empty lets each call choose."""

FLOATING_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
FLOAT32_ONLY = frozenset({torch.float32})

# Of all threads: torch's compiler does not trace what threads have of their own.
_triton_is_off = False

_OLDEST_CUDA_CAPABILITY = (8, 0)  # bfloat16 arithmetic and asynchronous copies start with Ampere


def use_triton(*tensors: torch.Tensor, dtypes: frozenset[torch.dtype] = FLOATING_DTYPES) -> bool:
    """Whether an operation on ``tensors`` should run its Triton kernel.

    By default it should when Triton is installed, every tensor is on a GPU that Triton serves, and every
    floating-point tensor has one of ``dtypes`` (those the kernel is written for). Integer tensors may have any dtype.

    Raises:
        ValueError: ``LKQ_KERNELS`` is neither ``torch`` nor ``triton``.
        RuntimeError: ``LKQ_KERNELS=triton``, but the kernel cannot run on these tensors.
    """
    choice = forced_implementation()
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 'torch', 'triton' or unset, found {choice!r}.")
    if choice == "torch":
        return False
    obstacle = next(filter(None, [_obstacle(tensor.dtype, tensor.device, dtypes) for tensor in tensors]), None)
    if choice == "triton" and obstacle is not None:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}=triton, but {obstacle}. Unset it to use the torch reference where it is needed."
        )
    # The interpreter is a debugger: it runs kernels on the CPU only where they are asked for.
    return obstacle is None and (choice == "triton" or not interpreting())


def forced_implementation() -> str:
    """What ``LKQ_KERNELS`` says, or `without_triton`; empty if each call chooses."""
    return "torch" if _triton_is_off else os.environ.get(ENVIRONMENT_VARIABLE, "")


@contextmanager
def without_triton() -> Iterator[None]:
    """Inside, every operation runs its torch reference: for a few tokens, no kernel is worth compiling."""
    global _triton_is_off
    _triton_is_off, before = True, _triton_is_off
    try:
        yield
    finally:
        _triton_is_off = before


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache  # every call of an operation asks
def _obstacle(dtype: torch.dtype, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
    """Why a Triton kernel that takes ``dtypes`` cannot run on such a tensor, or None."""
    if not _triton_installed():
        return "triton is not installed"
    if dtype.is_floating_point and dtype not in dtypes:
        return f"the kernel does not take {dtype} (it takes {', '.join(sorted(map(str, dtypes)))})"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"a tensor is on {device} (on a CPU, kernels run only under TRITON_INTERPRET=1)"
    if _capability(device) < _OLDEST_CUDA_CAPABILITY:
        return f"{device} is older than CUDA capability {'.'.join(map(str, _OLDEST_CUDA_CAPABILITY))}"
    return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where Triton's interpreter runs one thread block after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Options of a Triton launch on ``device``, so that the kernel may start before the one ahead of it is done.

    Such a kernel must call ``gdc_wait`` before it reads what another may have written, and before it writes. One that
    takes long should call ``gdc_launch_dependents`` only when it is nearly done: earlier, blocks of the next kernel
    crowd on multiprocessors where this one has few. Empty where the GPU (before Hopper) or Triton's interpreter cannot
    do it.
    """
    if interpreting() or device.type != "cuda" or torch.version.cuda is None or _capability(device) < (9, 0):
        return {}
    return {"launch_pdl": True}


# Triton's own functions of these names go through its compiler's machinery, and take longer than a launch on a GPU.


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up; for launches, on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``, a positive number; for launches, on the host."""
    return 1 << (n - 1).bit_length()
