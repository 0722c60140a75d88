"""The judge of pictures of the objects world: what the detector finds of what a caption names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detector import Detection
from .world import Scene

__all__ = ["Judgement", "judge", "mean_judgements"]


@dataclass(frozen=True)
class Judgement:
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


def judge(scene: Scene, found: Sequence[Detection]) -> Judgement:
    """Judge what was found in a picture by the caption of a scene."""
    wanted = [(what.noun, what.colour) for what in scene.named for _ in range(what.count)]
    present = (Counter(noun for noun, _ in wanted) & Counter(d.noun for d in found)).total()
    # Those with a colour take theirs first, so that "a red car and a car" is bound by a red and any other car.
    left = list(found)
    bound = 0
    for noun, colour in sorted(wanted, key=lambda w: w[1] is None):
        match = next((d for d in left if d.noun == noun and colour in (None, d.colour)), None)
        if match is not None:
            left.remove(match)
            bound += 1
    return Judgement(
        len(wanted), present / len(wanted), bound / len(wanted), bound == len(wanted) == len(found),
        _stands(scene, found) if scene.relation else None,
    )  # fmt: skip


def mean_judgements(judgements: Sequence[Judgement]) -> dict[str, dict[str, float]]:
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


def _stands(scene: Scene, found: Sequence[Detection]) -> bool:
    axis = 0 if scene.relation == "left of" else 1
    first, second = (next((d.centre[axis] for d in found if d.noun == what.noun), None) for what in scene.named)
    return first is not None and second is not None and first < second
