"""What each condition costs: milliseconds a denoising step, paired with stock, and the most memory a run takes."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..measure.memory import peak_mib
from .conditions import STOCK, Condition, Given
from .run import draw, given_for
from .subjects import Subject

__all__ = ["costs"]


def costs(
    pipe: Any, subject: Subject, conditions: Sequence[Condition], given: Given, pictures: int = 4, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Condition -> "ms a step", a median over rounds in which conditions take turns; "of stock", the median of its
    ratios to stock's time in the same round; "peak MiB", what its tensors take at the most beside the weights.

    All of a call is counted, text encoding and decoding too, and divided by the steps.
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
            "peak MiB": peak_mib(functools.partial(draw, pipe, condition, mine, subject, part), pipe.device),
        }
    return found


def _wait(pipe: Any) -> None:
    if torch.device(pipe.device).type == "cuda":
        torch.cuda.synchronize()
