"""The most that tensors take at once while something runs."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

__all__ = ["peak_mib"]


def peak_mib(call: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """MiB of the tensors that live at once beside those there before: on CUDA by the allocator's count, on a CPU by
    torch's profiler, which slows the call down."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler says on stderr when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20
