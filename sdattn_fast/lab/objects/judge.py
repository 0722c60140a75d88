"""The judge of pictures of the objects world: what the detector finds of what a caption names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detector import PictogramDetection
from .world import ObjectsScene

__all__ = ["ObjectsJudgement", "judge_detections", "mean_judgements"]


@dataclass(frozen=True)
class ObjectsJudgement:
    """What the detector says of one picture.

    present: share of the objects that the caption names whose noun is there, each detection used once; bound: share
    whose noun is there in the colour that the caption gives it, where it gives one; right: all bound, and nothing else
    in the picture; relation: both of a named relation are there and stand so, None where the caption has none.
    """

    objects: int
    present: float
    bound: float
    right: bool
    relation: bool | None


def judge_detections(scene: ObjectsScene, detections: Sequence[PictogramDetection]) -> ObjectsJudgement:
    """Judge what was found in a picture by the caption of a scene."""
    wanted = [(item.noun, item.colour) for item in scene.named for _ in range(item.count)]
    present = (Counter(noun for noun, _ in wanted) & Counter(d.noun for d in detections)).total()
    # Those with a colour take theirs first, so that "a red car and a car" is bound by a red and any other car.
    left = list(detections)
    bound = 0
    for noun, colour in sorted(wanted, key=lambda w: w[1] is None):
        match = next((d for d in left if d.noun == noun and colour in (None, d.colour)), None)
        if match is not None:
            left.remove(match)
            bound += 1
    return ObjectsJudgement(
        len(wanted), present / len(wanted), bound / len(wanted), bound == len(wanted) == len(detections),
        _stands(scene, detections) if scene.relation else None,
    )  # fmt: skip


def mean_judgements(judgements: Sequence[ObjectsJudgement]) -> dict[str, dict[str, float]]:
    """By number of objects named, and over all: the mean of each measure, and how many pictures it rests on."""
    groups = {f"{n} objects" if n > 1 else "1 object": [j for j in judgements if j.objects == n] for n in (1, 2, 3, 4)}
    groups["all"] = list(judgements)
    return {
        name: {
            "pictures": len(group),
            "present": float(np.mean([j.present for j in group])),
            "bound": float(np.mean([j.bound for j in group])),
            "all right": float(np.mean([j.right for j in group])),
            "relation": float(np.mean([float(j.relation) for j in group if j.relation is not None] or [np.nan])),
        }
        for name, group in groups.items()
        if group
    }


def _stands(scene: ObjectsScene, detections: Sequence[PictogramDetection]) -> bool:
    axis = 0 if scene.relation == "left of" else 1
    first, second = (next((d.centre[axis] for d in detections if d.noun == item.noun), None) for item in scene.named)
    return first is not None and second is not None and first < second
