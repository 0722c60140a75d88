"""The lab's worlds as what is evaluated: captions to choose settings on, and others to report on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..guidance.clip_score import ClipScorer
from ..lab.pipeline import world_path

__all__ = ["world_subject"]


def world_subject(
    world: str, count: int, scorer: ClipScorer | None = None, *, choosing: bool = False, folder: Path | None = None
) -> Any:
    """So many captions of the world "shapes" or "objects", a `Subject`.

    Args:
        scorer: CLIP, whose cosine is measured too. None: the world's own for "shapes", none for "objects".
        choosing: captions that settings are chosen on, in place of those that are reported on.
        folder: of another pipeline for the world, with its detector and CLIP.

    Raises: as `lab.pipeline.world_path`; OSError where the folder has none of these.
    """
    if world == "shapes":
        from ..lab.shapes.captions import SELECTION_SEED as SHAPES_SELECTION_SEED
        from .subjects import ShapesWorld

        scorer = scorer or ClipScorer.load((folder or world_path(world)) / "clip")
        return ShapesWorld(count, scorer, *((SHAPES_SELECTION_SEED, False) if choosing else ()))
    from ..lab.objects.captions import report_scenes, selection_scenes
    from ..lab.objects.detector import PictogramDetector
    from .objects_world import ObjectsWorld

    scenes = selection_scenes(count) if choosing else report_scenes(count)
    return ObjectsWorld(scenes, PictogramDetector.load(folder), scorer)
