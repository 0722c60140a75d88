"""Whom the evaluation asks: the shapes world, where the truth is known, or a user's prompts, where CLIP and optional
judges say what they can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..guidance.clip_score import ClipScorer
from ..guidance.phrases import NounPhrase, find_phrases
from .judges import Judge

__all__ = ["Prompts", "ShapesWorld", "Subject"]


class Subject(Protocol):
    """prompts: what is drawn. measures: names of what `measure` gives, in the report's order; higher is better for all.
    guidance, steps: how it is drawn. needs_maps: `measure` looks at word maps."""

    prompts: Sequence[str]
    guidance: float
    steps: int
    needs_maps: bool

    @property
    def measures(self) -> Sequence[str]: ...

    def phrases(self, index: int, tokenizer: Any) -> tuple[list[NounPhrase], list[NounPhrase]]:
        """All noun phrases of a prompt, and those of them that name an object to be drawn."""

    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], maps: Sequence[Sequence[np.ndarray] | None]
    ) -> list[dict[str, float]]:
        """Of each picture (height, width, 3) uint8 of the prompts of these indices, its measures; NaN where there is
        nothing to measure. maps: of each object of the prompt, (height, width); None where none were kept."""


class ShapesWorld:
    """Held-out captions of the shapes world, judged by its detector, and by its CLIP, which is no judge but a reward.

    present, bound: shares of the caption's objects whose shape, and whose shape in its colour, is there. all right:
    all bound and nothing else. relation: both objects of a named relation are there and stand so. sharpness, map IoU,
    map boundary F: as in docs/structure.md. pointing: the map's strongest pixel lies in the object.
    """

    measures = (
        "present", "bound", "all right", "relation", "sharpness", "map IoU", "map boundary F", "pointing", "CLIP",
    )  # fmt: skip

    needs_maps = True

    def __init__(self, count: int, scorer: ClipScorer, first: int | None = None, held_out: bool = True) -> None:
        from ..lab.pipeline import GUIDANCE, STEPS
        from ..lab.shapes.captions import HELD_OUT_SEED, held_out_scenes

        self.scenes = held_out_scenes(count, held_out, HELD_OUT_SEED if first is None else first)
        self.prompts = [scene.caption for scene in self.scenes]
        self.guidance, self.steps, self.scorer = GUIDANCE, STEPS, scorer

    def phrases(self, index: int, tokenizer: Any) -> tuple[list[NounPhrase], list[NounPhrase]]:
        scene = self.scenes[index]
        phrases = find_phrases(scene.caption, tokenizer)
        ends = {truth.end for truth in scene.phrases if truth.object is not None}
        objects = [p for p in phrases if p.end in ends]
        assert len(objects) == len(scene.objects), scene.caption
        return phrases, objects

    def texts(self, index: int) -> list[str]:
        """Of each object of a prompt, its colour and shape in words, for CLIP."""
        from ..lab.shapes.captions import phrases_of

        return phrases_of(self.prompts[index])

    def masks(self, index: int, picture: np.ndarray) -> list[np.ndarray | None]:
        """Of each object of a prompt, its mask in a picture, None where the detector does not find it."""
        from ..lab.shapes.judge import object_masks

        return object_masks(self.prompts[index], picture)

    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], maps: Sequence[Sequence[np.ndarray] | None]
    ) -> list[dict[str, float]]:
        from ..lab.shapes.detector import detect
        from ..lab.shapes.measures import measure

        similar = self.scorer.similarity(list(pictures), [self.prompts[i] for i in indices])
        rows = []
        for i, picture, heat, cosine in zip(indices, pictures, maps, similar.tolist(), strict=True):
            scene = self.scenes[i]
            blank = [np.zeros(picture.shape[:2])] * len(scene.objects)
            detections = detect(picture)
            row = measure(scene, picture, blank if heat is None else heat, detections)
            if heat is None:
                row |= {"map IoU": float("nan"), "map boundary F": float("nan")}
            row["pointing"] = float("nan") if heat is None else _pointing(scene, detections, heat)
            row["relation"] = _relation(scene, detections)
            row["CLIP"] = cosine
            rows.append({name: row[name] for name in self.measures})
        return rows


class Prompts:
    """A user's prompts: CLIP's cosine of picture and prompt, of its weakest noun phrase, and what judges measure."""

    needs_maps = False

    def __init__(
        self, prompts: Sequence[str], scorer: ClipScorer, judges: Sequence[Judge] = (), guidance: float = 7.5,
        steps: int = 50, phrases: Mapping[int, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        self.prompts, self.scorer, self.judges = list(prompts), scorer, judges
        self.guidance, self.steps = guidance, steps
        self.chosen_phrases = dict(phrases or {})
        self._texts: dict[int, list[str]] = {}

    @property
    def measures(self) -> tuple[str, ...]:
        return ("CLIP", "CLIP of the weakest phrase", *(m for judge in self.judges for m in judge.measures))

    def phrases(self, index: int, tokenizer: Any) -> tuple[list[NounPhrase], list[NounPhrase]]:
        prompt = self.prompts[index]
        phrases = find_phrases(prompt, tokenizer, phrases=self.chosen_phrases.get(index))
        # A prompt without a noun is one phrase, as far as the tokenizer reads it.
        words = prompt.split()
        while not phrases and words:
            phrases = find_phrases(prompt, tokenizer, phrases=[" ".join(words)])
            words.pop()
        self._texts[index] = [p.text for p in phrases]
        return phrases, phrases

    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], maps: Sequence[Sequence[np.ndarray] | None]
    ) -> list[dict[str, float]]:
        seen = self.scorer.pictures(list(pictures))
        whole = (seen * self.scorer.texts([self.prompts[i] for i in indices])).sum(-1)
        rows = []
        for i, picture, cosine in zip(indices, seen, whole.tolist(), strict=True):
            texts = self._texts.get(i, [])
            weakest = float((self.scorer.texts(texts) @ picture).min()) if texts else float("nan")
            rows.append({"CLIP": cosine, "CLIP of the weakest phrase": weakest})
        for judge in self.judges:
            phrases = [self._texts.get(i, []) for i in indices]
            for row, measured in zip(rows, judge.measure(indices, pictures, phrases), strict=True):
                row |= measured
        return rows


def _pointing(scene: Any, detections: Sequence[Any], maps: Sequence[np.ndarray]) -> float:
    """Over the objects that are there: is the strongest pixel of the noun's map in one of that colour and shape?"""
    hits = []
    for thing, heat in zip(scene.objects, maps, strict=True):
        masks = [d.mask for d in detections if (d.colour, d.shape) == (thing.colour, thing.shape)]
        if masks:
            hits.append(bool(np.logical_or.reduce(masks).flat[int(heat.argmax())]))
    return float(np.mean(hits)) if hits else float("nan")


def _relation(scene: Any, detections: Sequence[Any]) -> float:
    if scene.relation is None:
        return float("nan")
    places = [
        [d.centre for d in detections if (d.colour, d.shape) == (thing.colour, thing.shape)] for thing in scene.objects
    ]
    axis = 0 if scene.relation == "left of" else 1
    return float(any(a[axis] < b[axis] for a in places[0] for b in places[1]))
