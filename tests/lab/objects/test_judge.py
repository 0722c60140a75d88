"""The judge counts what a caption names, each found object once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sdattn_fast.lab.objects.detector import PictogramDetection
from sdattn_fast.lab.objects.judge import judge_detections, mean_judgements
from sdattn_fast.lab.objects.world import NamedObjects, sample_scene

MASK = np.zeros((64, 64), bool)


def named(*phrases: NamedObjects, relation: str | None = None):
    return dataclasses.replace(sample_scene(0), named=phrases, relation=relation)


def detections(*things: tuple[str, str | None], at=None):
    return [PictogramDetection(noun, colour, (at or [(0, 0)] * 9)[i], MASK) for i, (noun, colour) in enumerate(things)]


RED_CAR, CAR, OWLS = NamedObjects("car", "red", 1), NamedObjects("car", None, 1), NamedObjects("owl", None, 2)


@pytest.mark.parametrize(
    ("phrases", "things", "present", "bound", "right"),
    [
        ([RED_CAR, OWLS], [("car", "red"), ("owl", None), ("owl", None)], 1, 1, True),
        ([RED_CAR, OWLS], [("car", "blue"), ("owl", None)], 2 / 3, 1 / 3, False),
        ([RED_CAR, OWLS], [], 0, 0, False),
        ([RED_CAR], [("car", "red"), ("owl", None)], 1, 1, False),
        ([RED_CAR], [("car", None)], 1, 0, False),
        ([CAR], [("car", "pink")], 1, 1, True),
        ([CAR, RED_CAR], [("car", "red"), ("car", "blue")], 1, 1, True),
        ([CAR, RED_CAR], [("car", "green"), ("car", "blue")], 1, 1 / 2, False),
    ],
)
def test_shares(phrases, things, present, bound, right):
    judged = judge_detections(named(*phrases), detections(*things))
    assert (judged.present, judged.bound, judged.right) == (pytest.approx(present), pytest.approx(bound), right)


@pytest.mark.parametrize(
    ("relation", "at", "stands"),
    [
        ("left of", [(10, 40), (50, 10)], True),
        ("left of", [(50, 40), (10, 10)], False),
        ("above", [(10, 40), (50, 10)], False),
        ("above", [(50, 10), (10, 40)], True),
    ],
)
def test_relations(relation, at, stands):
    scene = named(CAR, NamedObjects("owl", None, 1), relation=relation)
    assert judge_detections(scene, detections(("car", "red"), ("owl", None), at=at)).relation is stands
    assert judge_detections(scene, detections(("car", "red"), at=at)).relation is False
    assert judge_detections(named(CAR), detections(("car", "red"))).relation is None


def test_true_scenes_are_right():
    for seed in range(100):
        scene = sample_scene(seed)
        judged = judge_detections(
            scene, [PictogramDetection(o.noun, o.colour, o.centre, o.mask) for o in scene.objects]
        )
        assert judged.present == judged.bound == 1 and judged.right and judged.relation in (None, True)


def test_means():
    judged = [
        judge_detections(named(RED_CAR), detections(("car", "red"))),
        judge_detections(named(RED_CAR, OWLS), detections(("car", "red"))),
    ]
    rows = mean_judgements(judged)
    assert list(rows) == ["1 object", "3 objects", "all"]
    assert rows["all"]["present"] == pytest.approx((1 + 1 / 3) / 2) and rows["all"]["pictures"] == 2
    assert np.isnan(rows["all"]["relation"])
