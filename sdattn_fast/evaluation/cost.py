"""What each condition costs: milliseconds a denoising step, paired with stock, and the most memory a run takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .conditions import STOCK, Condition, Given
from .run import draw, given_for
from .subjects import Subject

__all__ = ["costs", "peak_mib"]


def costs(
    pipe: Any, subject: Subject, conditions: Sequence[Condition], given: Given, pictures: int = 4, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Condition -> "ms a step", a median over rounds in which conditions take turns; "of stock", the median of its
    ratios to stock's time in the same round; "peak MiB", what its tensors take at the most beside the weights.

    All of a call is counted, text encoding and decoding too, and divided by the steps. Memory is torch's: of the CUDA
    allocator, or on a CPU of its profiler.
    """
    part = range(min(pictures, len(subject.prompts)))
    mine = given_for(subject, part, pipe, given)
    times: dict[str, list[float]] = {c.name: [] for c in conditions}
    for turn in range(rounds + 1):
        for condition in conditions:
            _wait(pipe)
            start = time.perf_counter()
            draw(pipe, condition, mine, subject, part)
            _wait(pipe)
            if turn:  # the first of each warms up
                times[condition.name].append(time.perf_counter() - start)
    found = {}
    for condition in conditions:
        steps = subject.steps
        if condition.tuned and given.tuned is not None and given.tuned.num_inference_steps is not None:
            steps = given.tuned.num_inference_steps
        mine_of = times[condition.name]
        ratios = [a / b for a, b in zip(mine_of, times[STOCK], strict=True)]
        found[condition.name] = {
            "ms a step": 1e3 * statistics.median(mine_of) / steps,
            "of stock": statistics.median(ratios),
            "peak MiB": _peak(pipe, condition, mine, subject, part),
        }
    return found


def _peak(pipe: Any, condition: Condition, given: Given, subject: Subject, part: range) -> float:
    if torch.device(pipe.device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        draw(pipe, condition, given, subject, part)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_mib(lambda: draw(pipe, condition, given, subject, part))


def peak_mib(call: Callable[[], object]) -> float:
    """MiB, the most that the CPU tensors which a call makes take together, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def _wait(pipe: Any) -> None:
    if torch.device(pipe.device).type == "cuda":
        torch.cuda.synchronize()
