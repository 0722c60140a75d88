"""Which denoising step a model is at, told from its timesteps.

A run is a call of the pipeline, or, for a UNet alone, timesteps that do not rise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["StepCounter"]


class StepCounter:
    """Counts every forward of every model of a patch."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[int, int, float]] = {}  # of a model: the prompts encoded, steps done, last timestep

    def begin(self, model: nn.Module, timestep: Any, encoded: int) -> int:
        """The index of the step that begins, 0 where a run begins. encoded: how often the pipeline encoded prompts."""
        then, steps, last = self._runs.get(id(model), (-1, 0, -math.inf))
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and encoded:
            time = last  # the pipeline says where a run begins; to look at the device would halt it at every step
        else:
            time = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
        if then != encoded or time > last:
            steps = 0
        self._runs[id(model)] = (encoded, steps + 1, time)
        return steps

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, forwards that are not the run's."""
        runs = dict(self._runs)
        try:
            yield
        finally:
            self._runs = runs
