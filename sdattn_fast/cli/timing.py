"""Paired timing: the contestants take turns in one run, and what is reported is the median of each.

A machine that slows down slows all of them; a ratio of medians of alternating runs is what a speed claim here rests on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["alternate", "peak_tensor_bytes"]


def alternate(
    contestants: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, least: int = 5, most: int = 200
) -> dict[str, float]:
    """Median seconds per call of each contestant, called in turn until `seconds` each have passed.

    Each is called twice beforehand, so that compilation and first touches stay out. On a GPU the device is synchronised
    before each reading of the clock.
    """
    for run in contestants.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    until = time.perf_counter() + seconds * len(contestants)
    while len(next(iter(times.values()))) < least or time.perf_counter() < until:
        for name, run in contestants.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            times[name].append(time.perf_counter() - start)
        if len(next(iter(times.values()))) >= most:
            break
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_tensor_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of tensors, beyond those there before, that lived at once while `run` ran.

    On a GPU, the allocator's own count. On a CPU, tensors that torch made; what a C++ kernel keeps in a thread's
    workspace (under a megabyte) is not among them.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    counter = _LiveStorage()
    with counter:
        run()
    return counter.peak


class _LiveStorage(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        old = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_real(x)}
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if not _is_real(x):
                continue
            storage = x.untyped_storage()
            ident = storage._cdata
            if ident in old or ident in self._seen:
                continue
            size = storage.nbytes()
            self._seen.add(ident)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, ident, size)
        return result

    def _gone(self, ident: int, size: int) -> None:
        self._seen.discard(ident)
        self.live -= size


def _is_real(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.layout == torch.strided


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
