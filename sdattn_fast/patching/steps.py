"""Which denoising step a model is at, told from its timesteps.

A run is a call of the pipeline, or, for a UNet alone, timesteps that do not rise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..places import Place, looking_is_free

__all__ = ["StepCounter"]

_MOST = 65536  # bytes that are read to learn a schedule's timesteps; schedules have 8000 at most


class StepCounter:
    """Counts every forward of every model of a patch."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[int, int, float]] = {}  # of a model: the prompts encoded, steps done, last timestep
        self._times = _Timesteps()

    def begin(self, model: nn.Module, timestep: Any, encoded: int) -> int:
        """The index of the step that begins, 0 where a run begins. encoded: how often the pipeline encoded prompts."""
        then, steps, last = self._runs.get(id(model), (-1, 0, -math.inf))
        if isinstance(timestep, Tensor) and not looking_is_free(timestep.device) and encoded:
            time = last  # the pipeline says where a run begins
        else:
            time = self._times.of(timestep)
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


class _Timesteps:
    """Reads timesteps, those of a GPU once a schedule: a loop hands out one element after the other of a tensor."""

    def __init__(self) -> None:
        self._place: Place | None = None
        self._dtype: torch.dtype | None = None
        self._numbers: list[float] = []

    def of(self, timestep: Any) -> float:
        if not isinstance(timestep, Tensor):
            return float(timestep)
        first = timestep.detach().reshape(-1)[:1]
        if looking_is_free(timestep.device):
            return float(first)
        place = Place(first)
        if not place.lasts or first.untyped_storage().nbytes() > _MOST:
            return float(first)
        if self._place is None or not self._place.same_memory(place) or self._dtype != first.dtype:
            count = first.untyped_storage().nbytes() // first.element_size()
            self._numbers = torch.as_strided(first, (count,), (1,), 0).tolist()
            self._place, self._dtype = place, first.dtype
        return float(self._numbers[first.storage_offset()])
