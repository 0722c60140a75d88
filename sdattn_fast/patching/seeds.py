"""The seeds of the random mode: one for every picture, layer and timestep of a run, mixed from the user's."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_seed
from ..streams import Kept, capturing, to_device
from .steps import first_of

__all__ = ["LayerSeeds", "Seed", "checked_seed", "entry_seeds"]

Seed = int | Sequence[int] | None
_KEPT = 16


def checked_seed(seed: Any) -> Seed:
    """An int, from which pictures count upwards, or one for each picture. Raises: TypeError, ValueError."""
    if isinstance(seed, Tensor):
        raise TypeError(
            "seed: expected an int, a sequence of ints or None, got a Tensor (layer and timestep are mixed in)"
        )
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        for one in seed:
            check_seed(one)
            if one is None:
                raise TypeError("seed: expected a sequence of ints, got None in it")
        return tuple(seed)
    check_seed(seed)
    return seed


def entry_seeds(seed: int | Sequence[int], pictures: Sequence[int | None], encoded: int = 0) -> list[int]:
    """Of every batch entry the seed of its picture, 0 where it has none. encoded: how many pictures there are, where
    this batch may be some of them; else it is all.

    Raises: ValueError where seeds are too few or too many.
    """
    if isinstance(seed, int):
        return [0 if i is None else (seed + i) % 2**63 for i in pictures]
    mine = sorted({i for i in pictures if i is not None})
    if len(seed) not in (len(mine), encoded) and mine:
        raise ValueError(f"seed: expected an int or {len(mine)} seeds, one for each picture, got {len(seed)}")
    of_picture = dict(enumerate(seed)) if len(seed) == encoded else dict(zip(mine, seed, strict=False))
    return [0 if i is None else of_picture[i] for i in pictures]


class LayerSeeds:
    """Seed, timestep and layer through splitmix64's finaliser, without a look at the timestep. The same step of the
    same prompt has the same seeds again, whatever ran in between."""

    def __init__(self, names: Sequence[str]) -> None:
        self._keys = torch.tensor([[zlib.crc32(name.encode())] for name in names], dtype=torch.int64) << 32
        self._sent: dict[Any, Kept] = {}
        self._of_graphs: list[Kept] = []  # CUDA graphs may still be replayed, so their memory stays

    def at(self, seeds: Sequence[int], timestep: Any, device: torch.device) -> Tensor:
        """(layers, len(seeds)) int64 in [0, 2**63), on the device. timestep: a number, or a tensor, of which `first_of`
        counts."""
        if isinstance(timestep, Tensor):
            step = first_of(timestep).to(torch.float32)
        else:
            step = torch.tensor([float(timestep)], dtype=torch.float32)
        # Schedulers with fractional timesteps exist: their bits count, not their floor.
        bits = step.view(torch.int32).to(torch.int64)
        x = self._on(bits.device, tuple(seeds)) ^ bits
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ _shifted(x, shift)) * factor
        return to_device((x ^ _shifted(x, 31)) & (2**63 - 1), device)

    def _on(self, device: torch.device, seeds: tuple[int, ...]) -> Tensor:
        """Layers and seeds, mixed. Sent once, since a CUDA graph that is captured can be sent nothing."""
        sent = self._sent.pop((device, seeds), None)
        if sent is None:
            sent = Kept(to_device(self._keys ^ torch.tensor(seeds, dtype=torch.int64), device))
        self._sent[device, seeds] = sent
        if capturing(device):
            self._of_graphs.append(sent)
        for old in list(self._sent)[:-_KEPT]:
            self._sent.pop(old, None)
        return sent.get()


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right without the sign, which torch's int64 drags along."""
    return (x >> by) & ((1 << (64 - by)) - 1)
