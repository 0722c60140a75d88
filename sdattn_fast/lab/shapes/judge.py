"""The judge of pictures of the shapes world: what the detector finds of what a caption names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .captions import objects_of
from .detector import ShapeDetection, detect, detect_background
from .world import ShapesScene

__all__ = ["ShapesJudgement", "bound_objects", "judge_picture", "judgement_table", "object_masks", "shapes_truth"]


@dataclass(frozen=True)
class ShapesJudgement:
    """What the detector says of one picture.

    present: share of the caption's objects whose shape is there, each detection used once; bound: share whose colour
    and shape are there together; right: all bound, and nothing else in the picture; background: right, None where the
    caption names none.
    """

    objects: int
    present: float
    bound: float
    right: bool
    background: bool | None


def judge_picture(
    scene: ShapesScene, image: np.ndarray, detections: Sequence[ShapeDetection] | None = None
) -> ShapesJudgement:
    """Judge a picture (64, 64, 3) uint8 by the caption of a scene. detections: of `detect`, where they are known."""
    detections = detect(image) if detections is None else detections
    wanted = [(o.colour, o.shape) for o in scene.objects]
    bound = _matched(wanted, [(d.colour, d.shape) for d in detections])
    present = _matched([w[1] for w in wanted], [d.shape for d in detections])
    named = any(p.object is None for p in scene.phrases)
    return ShapesJudgement(
        len(wanted), present / len(wanted), bound / len(wanted), bound == len(wanted) == len(detections),
        detect_background(image) == scene.background if named else None,
    )  # fmt: skip


def judgement_table(judgements: Sequence[ShapesJudgement]) -> dict[str, dict[str, float]]:
    """By number of objects, and over all: the mean of each measure, and how many pictures it rests on."""
    groups = {f"{n} objects" if n > 1 else "1 object": [j for j in judgements if j.objects == n] for n in (1, 2, 3)}
    groups["all"] = list(judgements)
    rows = {}
    for name, group in groups.items():
        if group:
            named = [j.background for j in group if j.background is not None]
            rows[name] = {
                "pictures": len(group),
                "objects present": float(np.mean([j.present for j in group])),
                "colour and shape bound": float(np.mean([j.bound for j in group])),
                "all right": float(np.mean([j.right for j in group])),
                "background": float(np.mean(named)) if named else float("nan"),
            }
    return rows


def shapes_truth(captions: Sequence[str]) -> Callable[[Any], list[np.ndarray | None]]:
    """For `iou_score`: the detector's masks of a drawn picture, None for an object that it does not find."""

    def truth(observation: Any) -> list[np.ndarray | None]:
        return object_masks(captions[observation.prompt], np.asarray(observation.picture))[: len(observation.words)]

    return truth


def object_masks(caption: str, picture: np.ndarray) -> list[np.ndarray | None]:
    """Of each object of a caption, its mask in a picture (height, width, 3) uint8, None where it is not found."""
    detections = detect(picture)
    return [next((d.mask for d in detections if (d.colour, d.shape) == wanted), None) for wanted in objects_of(caption)]


def bound_objects(captions: Sequence[str], pictures: Sequence[Any]) -> np.ndarray:
    """(n,) float64: of each caption, the share of its objects that the detector finds in its picture, colour and shape
    together, each detection used once. The judge of tuned programs."""
    shares = []
    for caption, picture in zip(captions, pictures, strict=True):
        wanted = Counter(objects_of(caption))
        detected = Counter((d.colour, d.shape) for d in detect(np.asarray(picture)))
        shares.append((wanted & detected).total() / max(1, wanted.total()))
    return np.array(shares)


def _matched(wanted: list[Any], detected: list[Any]) -> int:
    return sum((Counter(wanted) & Counter(detected)).values())
