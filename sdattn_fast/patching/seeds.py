"""The seeds of the random mode: one for every layer and timestep of a run, mixed from the user's."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..streams import Kept, to_device
from .steps import first_of

__all__ = ["LayerSeeds"]


class LayerSeeds:
    """Seed, timestep and layer through splitmix64's finaliser, without a look at the timestep. The same step of the
    same prompt has the same seeds again, whatever ran in between."""

    def __init__(self, names: Sequence[str]) -> None:
        keys = torch.tensor([zlib.crc32(name.encode()) for name in names], dtype=torch.int64)
        self._keys = {keys.device: Kept(keys)}

    def at(self, seed: int, timestep: Any, device: torch.device) -> Tensor:
        """(layers,) int64 in [0, 2**63), on the device. timestep: a number, or a tensor, of which `first_of` counts."""
        if isinstance(timestep, Tensor):
            step = first_of(timestep).to(torch.float32)
        else:
            step = torch.tensor([float(timestep)], dtype=torch.float32)
        # Schedulers with fractional timesteps exist: their bits count, not their floor.
        bits = step.view(torch.int32).to(torch.int64)
        x = (self._keys_on(bits.device) << 32) ^ bits ^ seed
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ _shifted(x, shift)) * factor
        return to_device((x ^ _shifted(x, 31)) & (2**63 - 1), device)

    def _keys_on(self, device: torch.device) -> Tensor:
        if device not in self._keys:
            self._keys[device] = Kept(to_device(self._keys[torch.device("cpu")].get(), device))
        return self._keys[device].get()


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right without the sign, which torch's int64 drags along."""
    return (x >> by) & ((1 << (64 - by)) - 1)
