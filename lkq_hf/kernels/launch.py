"""What a launch and an operator cost the host, where many follow each other: as little as can be."""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from lkq_hf.kernels.dispatch import interpreting


class RepeatedLaunch:
    """A Triton kernel that is launched again and again with arguments of the same kind.

    At every launch Triton looks at each argument to find the compiled kernel that it needs, which takes the host
    longer than the launch itself. This looks once.

    All calls have tensors of the same dtypes on the same device, which begin at a multiple of 16 bytes, as new ones
    do; and the same integers, but for those that the kernel lists in ``do_not_specialize``.

    Args:
        kernel: a function with ``triton.jit``.
        constants: its `tl.constexpr` arguments, which are its last ones, in their order.
        options: of the launch, such as ``num_warps``.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self._kernel = kernel
        self._constants = constants
        self._options = options
        self._values = tuple(constants.values())
        self._compiled: Any = None

    @property
    def takes_addresses(self) -> bool:
        """Whether tensors may be given as their addresses, about which Triton asks the driver nothing."""
        return self._compiled is not None

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launches the kernel on the current device: so many thread blocks, with all arguments but the constants."""
        if self._compiled is not None:
            self._compiled[grid](*arguments, *self._values)
        elif interpreting():
            self._kernel[grid](*arguments, **self._constants)
        else:
            self._compiled = self._kernel[grid](*arguments, **self._constants, **self._options)


def aligned(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Tensors as a `RepeatedLaunch` takes them, copied if they are views from the middle, and their addresses."""
    addresses = tuple([tensor.data_ptr() for tensor in tensors])
    if reduce(or_, addresses) % 16:
        tensors = tuple([tensor.clone() if tensor.data_ptr() % 16 else tensor for tensor in tensors])
        addresses = tuple([tensor.data_ptr() for tensor in tensors])
    return tensors, addresses


class OnDevice:
    """A `RepeatedLaunch` on one device, whichever the current one is."""

    def __init__(self, device: torch.device, launch: RepeatedLaunch) -> None:
        self._device = device
        self._launch = launch

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        if self._launch.takes_addresses:
            arguments = tuple([each.data_ptr() if isinstance(each, Tensor) else each for each in arguments])
        if self._device.type != "cuda" or self._device.index == torch.cuda.current_device():
            self._launch(grid, *arguments)
        else:
            with torch.cuda.device(self._device):
                self._launch(grid, *arguments)


class Launch:
    """A Triton kernel that is launched with arguments of several kinds: a `RepeatedLaunch` for each of them.

    Two calls are of one kind if Triton compiles the same code for them: it looks at the dtypes of tensors and at
    whether they begin at a multiple of 16 bytes, and at which integers are 1 or a multiple of 16.

    Args:
        kernel: a function with ``triton.jit``, whose `tl.constexpr` arguments are its last ones.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._launches: dict[Any, OnDevice] = {}

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        **options: Any,
    ) -> None:
        """Launches the kernel.

        Args:
            device: on which.
            grid: so many thread blocks.
            arguments: all but the constants, by place.
            constants: in the order of the kernel's arguments.
            options: of the launch, such as ``num_warps``.
        """
        kind = (device, *constants.values(), *options.values(), *map(_kind, arguments))
        launch = self._launches.get(kind)
        if launch is None:
            launch = self._launches[kind] = OnDevice(device, RepeatedLaunch(self._kernel, constants, **options))
        launch(grid, *arguments)


def _kind(argument: Any) -> Any:
    """What Triton looks at when it chooses the compiled code for an argument."""
    if type(argument) is int:
        return (argument % 16 == 0) + 2 * (argument == 1) + 4 * (argument.bit_length() > 31)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return type(argument)


def operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function an operator of torch, as `torch.library.custom_op` does: compilers do not look inside.

    Its calls take the host a third of the time, as nothing is checked: the result must not share memory with an input.
    It is not differentiable. Needs a `torch.library.register_fake`.

    Args:
        name: with its namespace.
    """

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "default", function)
        namespace, short_name = name.split("::")
        overload: Callable[..., Any] = getattr(getattr(torch.ops, namespace), short_name).default
        return overload

    return make


def sees_operators(x: Tensor) -> bool:
    """Whether a compiler, a mode, a transformation or a subclass of tensors would see an operator called with ``x``.

    If nothing does, the operator's function may be called itself, which takes the host less.
    """
    return (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
