"""Captions of the objects world: which are trained on, which are chosen on, and which are reported on. All that are not
trained on are true."""

from __future__ import annotations

from .world import ObjectsScene, sample_scene

__all__ = ["SELECTION_SEED", "REPORT_SEED", "selection_scenes", "report_scenes"]

SELECTION_SEED = 600_000_000
REPORT_SEED = 500_000_000


def selection_scenes(count: int, first: int = 0) -> list[ObjectsScene]:
    """Scenes whose captions settings are chosen on, from the first one on: two, three and four objects by turns."""
    return [sample_scene(SELECTION_SEED + i, objects=2 + i % 3) for i in range(first, first + count)]


def report_scenes(count: int) -> list[ObjectsScene]:
    """Scenes whose captions results are reported on: two, three and four objects by turns."""
    return [sample_scene(REPORT_SEED + i, objects=2 + i % 3) for i in range(count)]
