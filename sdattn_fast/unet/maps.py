"""Captured maps, brought from a layer's rows to pictures of its grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .layers import Layer

__all__ = ["captured_maps"]


def captured_maps(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Layer name -> (B, T, height, width) or (B, H, T, height, width), the active entries alone.

    Raises: ValueError for a layer whose grid is unknown.
    """
    pictures = {}
    for layer in layers:
        if layer.captured is None:
            continue
        maps, active, grid = layer.captured
        if grid is None:
            raise ValueError(f"maps: layer {layer.name!r} ran outside a block that knows its height and width")
        if active is not None:
            maps = maps[active]
        pictures[layer.name] = maps.unflatten(-1, grid)
    return pictures
