"""Paired timing: the contestants take turns in one run, and what is reported is the median of each.

A machine that slows down slows all of them; a ratio of medians of alternating runs is what a speed claim here rests on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["alternate"]


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


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
