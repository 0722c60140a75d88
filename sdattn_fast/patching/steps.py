"""Which denoising step a forward belongs to, told from its timestep and the scheduler.

A step is what lies between two moves of the scheduler: its forwards have the same timestep, however many they are
(guidance in two forwards, a ControlNet before the UNet, the second look of self-attention guidance).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..places import Place, looking_is_free

__all__ = ["Steps", "Timesteps", "first_of"]

_MOST = 65536  # bytes that are read to learn a schedule's timesteps; schedules have 8000 at most


class Steps:
    """Counts the steps of one call. index: of the latest step, -1 before the first."""

    def __init__(self, index: int = -1, at: Any = None) -> None:
        self.index = index
        self._at = at

    def begin(self, timestep: Any, scheduler: Any) -> bool:
        """A forward at a timestep begins; whether a step does."""
        at = _position(timestep), getattr(scheduler, "step_index", None), getattr(scheduler, "counter", None)
        if self._at is not None and _same(at, self._at):
            return False
        self.index += 1
        self._at = at
        return True

    def copy(self) -> Steps:
        return Steps(self.index, self._at)


class Timesteps:
    """Reads timesteps as numbers, those of a GPU once a schedule: a loop hands out one element after the other of a
    tensor."""

    def __init__(self) -> None:
        # Replaced as a whole, never changed: other threads may be reading it.
        self._read: tuple[Place, torch.dtype, list[float]] | None = None

    def of(self, timestep: Any) -> float:
        if not isinstance(timestep, Tensor):
            return float(timestep)
        if not timestep.numel():
            return 0.0
        first = first_of(timestep)
        numbers = None if looking_is_free(timestep.device) else self._schedule(first)
        return float(first) if numbers is None else numbers[first.storage_offset()]

    def rises(self, timestep: Any) -> bool:
        """Whether a timestep is an element of a schedule that rises, as those that invert pictures do."""
        if not isinstance(timestep, Tensor) or not _is_of_schedule(timestep):
            return False
        numbers = self._schedule(first_of(timestep))
        return numbers is not None and numbers[0] < numbers[-1]

    def _schedule(self, first: Tensor) -> list[float] | None:
        """The numbers of the schedule that one lies in; None where reading it would be a wait each time."""
        place, size = Place(first), first.untyped_storage().nbytes()
        if size > _MOST or not (place.lasts or looking_is_free(first.device)):
            return None
        read = self._read
        if read is None or not read[0].same_memory(place) or read[1] != first.dtype:
            numbers = torch.as_strided(first, (size // first.element_size(),), (1,), 0).tolist()
            read = self._read = place, first.dtype, numbers
        return read[2]


def _position(timestep: Any) -> Any:
    """What is equal for equal timesteps: of elements of a schedule, which may have a number twice, where they lie. A
    GPU is not waited for then."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    if not timestep.numel():
        return 0.0
    first = first_of(timestep)
    # The tensor itself, so that its memory is not given to another while it is compared.
    return first if _is_of_schedule(timestep) else float(first)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    if a[1:] != b[1:]:
        return False
    x, y = a[0], b[0]
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.data_ptr() == y.data_ptr() and x.device == y.device
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return float(x) == float(y)
    return bool(x == y)


def _is_of_schedule(timestep: Tensor) -> bool:
    """Whether it is one element of a longer tensor, expanded perhaps."""
    one = all(stride == 0 or size == 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True))
    return one and timestep.untyped_storage().nbytes() > timestep.element_size()


def first_of(timestep: Tensor) -> Tensor:
    """(1,): the first entry's. Where each frame or token of it has its own, those of a picture to begin with may stay
    what they are while others fall, so it is their mean."""
    first = timestep.detach()
    if first.dim() > 1 and first[0].numel() > 1 and not _is_of_schedule(timestep):
        return first[0].to(torch.float32).mean()[None]
    return first.reshape(-1)[:1]
