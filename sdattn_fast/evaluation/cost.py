"""What each condition costs: milliseconds a step of a picture, paired with stock, and the most memory it takes."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..measure.memory import peak_mib
from .conditions import STOCK, Condition, ConditionInputs
from .peers.pipelines import pictures
from .run import draw_batch, inputs_for
from .subjects import Subject

__all__ = ["costs"]


def costs(
    pipe: Any,
    subject: Subject,
    conditions: Sequence[Condition],
    inputs: ConditionInputs,
    count: int = 4,
    rounds: int = 5,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, float]]:
    """Condition -> "ms a step" of one picture, a median over rounds and `count` pictures, each of which all conditions
    draw one after the other; "of stock", the median of its ratios to stock's time for the same picture in the same
    round; "peak MiB", what its tensors take at the most beside the weights, for the first picture.

    tell: called after each round.

    All of a call is counted, text encoding and decoding too, and divided by the steps. Every call draws one picture,
    for some peers serve no more. Stock is the pipeline alone: the patch that keeps its maps is none of its cost.
    """
    parts = [range(i, i + 1) for i in range(min(count, len(subject.prompts)))]
    part_inputs = [inputs_for(subject, part, pipe, inputs) for part in parts]
    times: dict[str, list[float]] = {c.name: [] for c in conditions}
    for turn in range(rounds + 1):
        # In turns as short as can be: the speed of a machine that others use drifts within seconds.
        for inputs_of_part, part in zip(part_inputs, parts, strict=True):
            for condition in conditions:
                _wait(pipe)
                start = time.perf_counter()
                _draw(pipe, condition, inputs_of_part, subject, part)
                _wait(pipe)
                if turn:  # the first of each warms up
                    times[condition.name].append(time.perf_counter() - start)
        tell(f"time: {turn} of {rounds} rounds" if turn else "time: warmed up")
    table = {}
    for condition in conditions:
        steps = subject.steps
        if condition.tuned and inputs.tuned is not None and inputs.tuned.num_inference_steps is not None:
            steps = inputs.tuned.num_inference_steps
        seconds = times[condition.name]
        ratios = [a / b for a, b in zip(seconds, times[STOCK], strict=True)]
        table[condition.name] = {
            "ms a step": 1e3 * statistics.median(seconds) / steps,
            "of stock": statistics.median(ratios),
            "peak MiB": peak_mib(
                functools.partial(_draw, pipe, condition, part_inputs[0], subject, parts[0]), pipe.device
            ),
        }
    return table


def _draw(pipe: Any, condition: Condition, inputs: ConditionInputs, subject: Subject, part: range) -> None:
    if condition.name != STOCK:
        draw_batch(pipe, condition, inputs, subject, part)
        return
    noise = [torch.Generator().manual_seed(i) for i in part]
    pictures(pipe, inputs.prompts, noise, subject.guidance, subject.steps)


def _wait(pipe: Any) -> None:
    if torch.device(pipe.device).type == "cuda":
        torch.cuda.synchronize()
