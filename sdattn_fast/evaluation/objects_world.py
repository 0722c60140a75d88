"""The objects world as what is evaluated: true captions, judged by its detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..guidance.clip_score import ClipScorer
from ..guidance.phrases import NounPhrase, find_phrases
from ..lab.objects.detector import PictogramDetection, PictogramDetector
from ..lab.objects.judge import judge_detections
from ..lab.objects.world import ObjectsScene

__all__ = ["ObjectsWorld", "object_phrases"]


class ObjectsWorld:
    """A `Subject`: captions of the objects world.

    present, bound: shares of the caption's objects whose noun, and whose noun in the colour that the caption gives it,
    is there. all right: all bound and nothing else. relation: both objects of a named relation are there and stand so.
    map IoU: of the map of a noun, over half of its range, with what is found of that noun. pointing: the map's
    strongest pixel lies in it. CLIP: the cosine by the world's CLIP, which is no judge but a reward; where it is given.
    """

    needs_maps = True

    def __init__(
        self, scenes: Sequence[ObjectsScene], detector: PictogramDetector, scorer: ClipScorer | None = None,
        guidance: float = 4.0, steps: int = 20,
    ) -> None:  # fmt: skip
        self.scenes, self.detector, self.scorer = list(scenes), detector, scorer
        self.prompts = [scene.caption for scene in self.scenes]
        self.guidance, self.steps = guidance, steps

    @property
    def measures(self) -> tuple[str, ...]:
        names = ("present", "bound", "all right", "relation", "map IoU", "pointing")
        return names if self.scorer is None else (*names, "CLIP")

    def phrases(self, index: int, tokenizer: Any) -> tuple[list[NounPhrase], list[NounPhrase]]:
        phrases = find_phrases(self.prompts[index], tokenizer)
        return phrases, object_phrases(self.scenes[index], phrases)

    def texts(self, index: int) -> list[str]:
        """Of each noun of a prompt, its phrase, for CLIP."""
        return [phrase.text for phrase in self.scenes[index].phrases if phrase.objects]

    def masks(self, index: int, picture: np.ndarray) -> list[np.ndarray | None]:
        """Of each noun of a prompt, the mask of all that the detector finds of it in a picture, None for nothing."""
        return _masks(self.scenes[index], self.detector([picture])[0])

    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], maps: Sequence[Sequence[np.ndarray] | None]
    ) -> list[dict[str, float]]:
        """As `Subject` says. maps: of each noun phrase of things, in the caption's order."""
        rows = []
        for i, detections, heat in zip(indices, self.detector(list(pictures)), maps, strict=True):
            judged = judge_detections(self.scenes[i], detections)
            fit, hits = _fit(self.scenes[i], detections, heat)
            relation = float("nan") if judged.relation is None else float(judged.relation)
            rows.append(
                {
                    "present": judged.present, "bound": judged.bound, "all right": float(judged.right),
                    "relation": relation, "map IoU": fit, "pointing": hits,
                }
            )  # fmt: skip
        if self.scorer is not None:
            cosines = self.scorer.similarity(list(pictures), [self.prompts[i] for i in indices])
            for row, cosine in zip(rows, cosines.tolist(), strict=True):
                row["CLIP"] = cosine
        return rows


def object_phrases(scene: ObjectsScene, found: Sequence[NounPhrase]) -> list[NounPhrase]:
    """Of the noun phrases found in a scene's caption, those that name things and not the background.

    Raises: ValueError where one of the things is named by none of them.
    """
    ends = [phrase.end for phrase in scene.phrases if phrase.objects]
    of_things = [phrase for phrase in found if phrase.end in ends]
    if [phrase.end for phrase in of_things] != ends:
        raise ValueError(f"found: expected the noun phrases of {scene.caption!r}, got {[p.text for p in found]}")
    return of_things


def _fit(
    scene: ObjectsScene, detections: Sequence[PictogramDetection], maps: Sequence[np.ndarray] | None
) -> tuple[float, float]:
    """Means over the nouns that are there: intersection over union, and whether the strongest pixel lies within."""
    overlaps, hits = [], []
    for there, heat in zip(_masks(scene, detections), maps or (), strict=maps is not None):
        if there is not None:
            strong = heat > (heat.min() + heat.max()) / 2
            overlaps.append((strong & there).sum() / (strong | there).sum())
            hits.append(bool(there.flat[int(heat.argmax())]))
    return (float(np.mean(overlaps)), float(np.mean(hits))) if hits else (float("nan"), float("nan"))


def _masks(scene: ObjectsScene, detections: Sequence[PictogramDetection]) -> list[np.ndarray | None]:
    of_nouns = ([d.mask for d in detections if d.noun == item.noun] for item in scene.named)
    return [np.logical_or.reduce(masks) if masks else None for masks in of_nouns]
