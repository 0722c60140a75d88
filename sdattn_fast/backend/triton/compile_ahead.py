"""Kernels compiled before they are needed, in parallel.

A call of anything runs once inside `planned`, where launches are listed and zeros stand for their results. `compiled`
then compiles what was listed. Launches of the same call, made as usual afterwards, find their kernels in Triton's
cache.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...streams import capturing
from ..devices import on_device
from . import gpu, launch

__all__ = ["RESULTS", "Planned", "compile_one", "compiled", "compiles", "planned", "zero_results"]

# The parameters that a kernel writes to.
RESULTS = {
    "backward_kernel": ("GradQuery", "Sums", "GateSums", "BiasSums"),
    "folded_kernel": ("P",),
    "gaussian_kernel": ("Out",),
    "picture_kernel": ("Out", "P", "Mass", "Maps", "Histogram", "Highest"),
    "rows_kernel": ("Out", "Maps", "Bits"),
    "shared_kernel": ("GradBias", "Relevance"),
    "smooth_kernel": ("Y",),
    "sum_kernel": ("First", "Second"),
}
_done: set[Hashable] = set()  # the kinds of launches that `compiled` has compiled


@dataclass(frozen=True)
class Planned:
    """A launch that was not made. kind: launches of equal kinds run the same compiled kernel."""

    kind: Hashable
    kernel: Any
    device: torch.device
    call: launch.Call


def compiles() -> bool:
    """Whether there is a GPU, and Triton to compile for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None and not gpu.interprets()


@contextlib.contextmanager
def planned() -> Iterator[list[Planned]]:
    """This thread's launches, one of each kind, once the context has ended; those known to be compiled are made."""
    found: dict[Hashable, Planned] = {}

    def take(kernel: Any, call: launch.Call) -> bool:
        arguments = call[1]
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        kind = kernel, device, _specialized(kernel, arguments), tuple(call[2].items())
        # What is missing from a graph that is being captured would be missing from every replay.
        if kind in _done or capturing(device):
            return False
        found.setdefault(kind, Planned(kind, kernel, device, call))
        zero_results(kernel, arguments)
        return True

    listed: list[Planned] = []
    token = launch.taken.set(take)
    try:
        # Backward passes launch from autograd's own thread otherwise.
        with torch.autograd.set_multithreading_enabled(False):
            yield listed
    finally:
        launch.taken.reset(token)
        listed += found.values()


def compiled(launches: list[Planned]) -> Iterator[bool]:
    """Compiles them on all cores, and yields for each whether it was, as they end. One that was not will be compiled by
    its launch, which says what is wrong."""
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sdattn_fast-compile")
    try:
        futures: dict[Future[None], Planned] = {pool.submit(compile_one, one): one for one in launches}
        for future in as_completed(futures):
            done = future.exception() is None
            if done:
                _done.add(futures[future].kind)
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


def compile_one(one: Planned) -> None:
    with on_device(one.device):
        launch.compile_only(one.kernel, *one.call)


def zero_results(kernel: Any, arguments: tuple[Any, ...]) -> None:
    """What a launch that is not made leaves."""
    for name, x in zip(kernel.arg_names, arguments, strict=False):
        if name in RESULTS[kernel.__name__] and x is not None:
            x.zero_()


def _specialized(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Hashable, ...]:
    """What Triton compiles a kernel for, of its arguments."""
    kinds: list[Hashable] = []
    for parameter, x in zip(kernel.params, arguments, strict=False):
        if isinstance(x, Tensor):
            kinds.append((x.dtype, x.data_ptr() % 16 == 0))
        elif isinstance(x, int):
            wide = x >= 2**31
            kinds.append(wide if parameter.do_not_specialize else (wide, x == 1, x % 16 == 0))
        else:
            kinds.append(x is None)
    return tuple(kinds)
