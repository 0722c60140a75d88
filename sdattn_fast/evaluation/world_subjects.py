"""The lab's worlds as what is evaluated: captions to choose settings on, and others to report on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..guidance.clip_score import ClipScorer
from ..guidance.phrases import head_words
from ..lab.pipeline import world_path
from ..patching.words import words_of

__all__ = ["bound_objects_of", "masks_of", "words_of_objects", "world_subject"]


def world_subject(
    world: str,
    count: int,
    scorer: ClipScorer | None = None,
    *,
    choosing: bool = False,
    first: int = 0,
    folder: Path | None = None,
) -> Any:
    """So many captions of the world "shapes" or "objects", a `Subject`.

    Args:
        scorer: CLIP, whose cosine is measured too. None: the world's own for "shapes", none for "objects".
        choosing: captions that settings are chosen on, in place of those that are reported on.
        first: of these it begins with the one of this index.
        folder: of another pipeline for the world, with its detector and CLIP.

    Raises: as `lab.pipeline.world_path`; OSError where the folder has none of these.
    """
    if world == "shapes":
        from ..lab.shapes.captions import SELECTION_SEED as SHAPES_SELECTION_SEED
        from .subjects import ShapesWorld

        scorer = scorer or ClipScorer.load((folder or world_path(world)) / "clip")
        return ShapesWorld(count, scorer, *((SHAPES_SELECTION_SEED + first, False) if choosing else ()))
    from ..lab.objects.captions import report_scenes, selection_scenes
    from ..lab.objects.detector import PictogramDetector
    from .objects_world import ObjectsWorld

    scenes = selection_scenes(count, first) if choosing else report_scenes(count)
    return ObjectsWorld(scenes, PictogramDetector.load(folder), scorer)


def words_of_objects(subject: Any, tokenizer: Any) -> list[list[str]]:
    """Of each prompt the words of its objects, as `Maps.per_word` calls them."""
    return [
        head_words(subject.phrases(i, tokenizer)[1], words_of(tokenizer, prompt))
        for i, prompt in enumerate(subject.prompts)
    ]


def masks_of(subject: Any) -> Callable[[Any], list[np.ndarray | None]]:
    """For `iou_score`: the masks of an observation's objects, by the world's detector."""

    def masks(observation: Any) -> list[np.ndarray | None]:
        found: list[np.ndarray | None] = subject.masks(observation.prompt, np.asarray(observation.picture))
        return found[: len(observation.words)]

    return masks


def bound_objects_of(*subjects: Any) -> Callable[[Sequence[str], Sequence[Any]], np.ndarray]:
    """A judge of pictures of these subjects' prompts: the share of each one's objects that are there, in their colours.

    Raises: KeyError for a prompt of none of them.
    """
    places = {prompt: (subject, i) for subject in subjects for i, prompt in enumerate(subject.prompts)}

    def judge(prompts: Sequence[str], pictures: Sequence[Any]) -> np.ndarray:
        rows = []
        for (subject, i), picture in zip((places[prompt] for prompt in prompts), pictures, strict=True):
            rows += subject.measure([i], [np.asarray(picture)], [None])
        return np.array([row["bound"] for row in rows])

    return judge
