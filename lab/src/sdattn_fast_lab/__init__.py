"""The trained pipelines of sdattn-fast's lab, a folder a world. Imports nothing but the standard library."""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path(name: str) -> Path:
    """The folder of a world, "shapes" or "objects": its pipeline, as `save_pretrained` wrote it, with its CLIPModel in
    the subfolder `clip`.

    Raises: ValueError for a world that is not here, naming those that are.
    """
    worlds = sorted({file.parent.name for file in Path(__file__).parent.glob("*/*.*") if file.suffix != ".pyc"})
    if name not in worlds:
        raise ValueError(f"name: expected {' or '.join(map(repr, worlds))}, got {name!r}")
    return Path(__file__).parent / name
