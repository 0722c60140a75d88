"""The maps of one call: the latest step's, and the sum of those before."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..streams import take_entries

__all__ = ["Grid", "LayerMaps", "MapSums"]

Grid = tuple[int, int] | tuple[int, int, int]  # (height, width), of videos (frames, height, width)
# maps (B, T, M) or (B, H, T, M), which entries they are of ((B,) bool on the CPU, None for all), their grid.
LayerMaps = tuple[Tensor, Tensor | None, Grid | None]


class MapSums:
    """By layer name. size: (height, width) of the latent. prompts: of the entries that the latest step asked."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self.prompts: tuple[int, ...] | None = None
        self.latest: dict[str, LayerMaps] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add_latest(self, mean: bool) -> None:
        """A step begins: the latest one's maps become part of the sum, or, without a mean, all there is."""
        for name, of_layer in self.latest.items():
            latest = _picture(name, of_layer).detach()
            total, steps = self._sums.get(name, (None, 0))
            if mean and total is not None and total.shape == latest.shape:
                # Not in place: somebody may hold what `read` gave.
                self._sums[name] = (total + latest, steps + 1)
            else:
                self._sums[name] = (latest, 1)
        self.latest = {}
        self.prompts = None

    def read(self, names: Iterable[str], mean: bool) -> dict[str, Tensor]:
        """(B, T, height, width) or (B, H, T, height, width): the mean so far; where gradients are on, the latest step,
        as part of the graph."""
        found = {}
        for name in names:
            of_layer = self.latest.get(name)
            latest = None if of_layer is None else _picture(name, of_layer)
            total, steps = self._sums.get(name, (None, 0))
            if latest is None:
                latest = None if total is None else total / steps
            elif mean and total is not None and not latest.requires_grad and total.shape == latest.shape:
                latest = (total + latest) / (steps + 1)
            if latest is not None:
                found[name] = latest
        return found


def _picture(name: str, of_layer: LayerMaps) -> Tensor:
    maps, entries, grid = of_layer
    if grid is None:
        raise ValueError(f"maps: layer {name!r} ran outside a block that knows its height and width")
    chosen = maps if entries is None else take_entries(maps, entries.nonzero()[:, 0].tolist())
    return chosen.unflatten(-1, grid)
