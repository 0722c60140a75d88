"""Launches of Triton's kernels. A launch that comes again, as one does at every denoising step, is bound once: the
compiled kernel, its grid and every number are kept, and only the tensors' addresses are new.

Triton's own way goes through every argument of a call to find what the kernel was compiled for. For these kernels, with
50 arguments, that takes 50 us, more than a small layer runs on a GPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..refusal import launching

__all__ = ["BoundLaunch", "Call", "compile_only", "launch", "launch_bound", "taken", "version"]

# The number of programs, the arguments in order, tensors first, and constants and options by name.
Call = tuple[int, tuple[Any, ...], dict[str, Any]]

# Asked before a launch, with the kernel; where it says True the launch is not made (compile_ahead.py).
taken: ContextVar[Callable[[Any, Call], bool] | None] = ContextVar("taken", default=None)

_MOST = 1024  # launches that are kept; each is a tuple of numbers
_bound: dict[Hashable, BoundLaunch] = {}


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Launch a kernel on the current device, compiling it if need be; the compiled kernel, or None where the launch is
    `taken`. Raises: KernelRefused."""
    take = taken.get()
    if take is not None and take(kernel, (programs, arguments, options)):
        return None
    with launching("triton", kernel.__name__):
        return kernel[programs,](*arguments, **_FUSION, **options)


def compile_only(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What `launch` does before it launches."""
    kernel.warmup(*arguments, grid=(programs,), **_FUSION, **options)


# Said because Triton 3.10 no longer fuses multiplications and additions by itself.
_FUSION = {"enable_fp_fusion": True}


def launch_bound(
    kernel: Any, tensors: Sequence[Tensor | None], key: Hashable, call: Callable[[], Call]
) -> BoundLaunch | None:
    """As `launch`, bound after the first time. Returns: the launch, None where Triton cannot bind one (interpreted), or
    where it is `taken`.

    tensors: the kernel's first arguments; they are on the current device. key: two launches of a kernel with equal keys
    differ in their tensors' addresses alone. call: describes the launch; asked where it is not bound yet.

    Raises: KernelRefused.
    """
    addresses: list[int | None] = []
    special = 0  # which are missing, and which addresses are no multiples of 16: kernels are compiled for that
    for i, x in enumerate(tensors):
        address = None if x is None else x.data_ptr()
        if address is None:
            special |= 1 << 2 * i
        elif address & 15:
            special |= 2 << 2 * i
        addresses.append(address)
    key = kernel, torch.cuda.current_device() if torch.cuda.is_initialized() else None, special, key
    again = _bound.get(key)
    if again is not None:
        again(addresses)
        return again
    programs, arguments, options = call()
    compiled = launch(kernel, programs, arguments, options)
    if not hasattr(compiled, "packed_metadata"):
        return None
    if len(_bound) >= _MOST:
        _bound.clear()
    again = _bound[key] = BoundLaunch(kernel, compiled, programs, arguments[len(tensors) :], options)
    return again


class BoundLaunch:
    """A launch that lacks nothing but its tensors' addresses, None for those that are missing."""

    def __init__(
        self, kernel: Any, compiled: Any, programs: int, numbers: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._name = kernel.__name__
        self._run = compiled[programs, 1, 1]
        if version() >= (3, 3):  # a compiled kernel takes its constants too, and skips them
            numbers += tuple(options.get(name) for name in kernel.arg_names[-_constants(kernel) :])
        self._numbers = numbers

    def __call__(self, addresses: Sequence[int | None]) -> None:
        """Raises: KernelRefused. Addresses must be multiples of 16 where those of the first launch were."""
        try:
            self._run(*addresses, *self._numbers)
        except Exception:
            with launching("triton", self._name):
                raise


def _constants(kernel: Any) -> int:
    return sum(parameter.is_constexpr for parameter in kernel.params)


@functools.cache
def version() -> tuple[int, int]:
    """Triton's. Not the distribution's: ROCm's wheels and nightly builds bring it under other names."""
    import triton

    major, minor = re.findall(r"\d+", triton.__version__)[:2]
    return int(major), int(minor)
