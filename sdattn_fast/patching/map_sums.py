"""The maps of one call: the latest step's, and the sum of those before."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from ..streams import take_entries

__all__ = ["Grid", "LayerMaps", "MapSums"]

Grid = tuple[int, int] | tuple[int, int, int]  # (height, width), of videos (frames, height, width)
# maps (B, T, M) or (B, H, T, M), which entries they are of ((B,) bool on the CPU, None for all), their grid.
LayerMaps = tuple[Tensor, Tensor | None, Grid | None]


class MapSums:
    """By layer name. size: (height, width) of the latent. prompts: of the entries that the latest step asked.

    A prompt that is exchanged within a call may have maps of more tokens or fewer, up to its padding: others are zero.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self.prompts: tuple[int, ...] | None = None
        self.latest: dict[str, LayerMaps] = {}
        self._sums: dict[str, tuple[Tensor, int, Grid]] = {}

    def add_latest(self, mean: bool) -> None:
        """A step begins: the latest one's maps become part of the sum, or, without a mean, all there is until the step
        has maps of its own."""
        if not mean and self.latest:
            self._sums = {}
        for name, of_layer in self.latest.items():
            latest, grid = _chosen(name, of_layer)
            # Not in place: somebody may hold what `read` gave.
            self._sums[name] = _sum(self._sums.get(name), latest.detach(), grid)
        self.latest = {}
        self.prompts = None

    def read(self, names: Iterable[str], mean: bool) -> dict[str, Tensor]:
        """(B, T, height, width) or (B, H, T, height, width): the mean so far; where gradients are on, the latest step,
        as part of the graph."""
        found: dict[str, tuple[Tensor, int, Grid]] = {}
        for name in names:
            # Without a mean, a layer that the latest step left out has no maps.
            before = self._sums.get(name) if mean or not self.latest else None
            of_layer = self.latest.get(name)
            if of_layer is not None:
                latest, grid = _chosen(name, of_layer)
                found[name] = _sum(before if mean and not latest.requires_grad else None, latest, grid)
            elif before is not None:
                found[name] = before
        tokens = max((total.shape[-2] for total, _, _ in found.values()), default=0)
        return {
            name: (_padded(total, tokens) / steps if steps > 1 else _padded(total, tokens)).unflatten(-1, grid)
            for name, (total, steps, grid) in found.items()
        }


def _sum(before: tuple[Tensor, int, Grid] | None, latest: Tensor, grid: Grid) -> tuple[Tensor, int, Grid]:
    """With the maps of the steps before, where those are of the same entries and pixels."""
    if before is None:
        return latest, 1, grid
    total, steps, grid_before = before
    tokens = max(total.shape[-2], latest.shape[-2])
    total, padded = _padded(total, tokens), _padded(latest, tokens)
    if grid != grid_before or total.shape != padded.shape:
        return latest, 1, grid
    return total + padded, steps + 1, grid


def _padded(maps: Tensor, tokens: int) -> Tensor:
    """(..., T, M), with zeros of so many tokens."""
    return maps if maps.shape[-2] == tokens else F.pad(maps, (0, 0, 0, tokens - maps.shape[-2]))


def _chosen(name: str, of_layer: LayerMaps) -> tuple[Tensor, Grid]:
    """The maps of the entries, (B, T, M) or (B, H, T, M)."""
    maps, entries, grid = of_layer
    if grid is None:
        raise ValueError(f"maps: layer {name!r} ran outside a block that knows its height and width")
    return maps if entries is None else take_entries(maps, entries.nonzero()[:, 0].tolist()), grid
