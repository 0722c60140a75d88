"""The judge must itself be right: on true scenes, on their absence, on a wrong picture."""

from __future__ import annotations

import numpy as np
import pytest

from sdattn_fast.lab.shapes.detector import detect, detect_background
from sdattn_fast.lab.shapes.judge import judge_picture, judgement_table
from sdattn_fast.lab.shapes.world import sample_scene

SCENES = [sample_scene(10_000_000 + i, held_out=i % 2 == 1) for i in range(300)]


def test_finds_99_percent_of_the_objects_of_true_scenes():
    wanted = hits = invented = 0
    for scene in SCENES:
        detections = detect(scene.image)
        names = [(d.colour, d.shape, d.size) for d in detections]
        wanted += len(scene.objects)
        hits += sum((o.colour, o.shape, o.size) in names for o in scene.objects)
        invented += max(0, len(detections) - len(scene.objects))
        assert detect_background(scene.image) == scene.background
    assert hits >= 0.99 * wanted
    assert invented <= 0.01 * wanted


def test_masks_and_centres_are_the_objects():
    for scene in SCENES[:40]:
        for thing in scene.objects:
            match = [d for d in detect(scene.image) if (d.colour, d.shape) == (thing.colour, thing.shape)]
            union = (match[0].mask | thing.mask).sum()
            assert (match[0].mask & thing.mask).sum() > 0.7 * union


def test_judgement_of_wrong_pictures():
    scene = sample_scene(3, objects=2)
    right = judge_picture(scene, scene.image)
    assert right.right and right.bound == right.present == 1.0
    empty = np.full((64, 64, 3), 128, dtype=np.uint8)
    assert judge_picture(scene, empty).bound == 0.0 and not judge_picture(scene, empty).right
    swapped = scene.image[..., ::-1].copy()
    assert not judge_picture(scene, swapped).right
    assert judgement_table([right, judge_picture(scene, empty)])["all"]["all right"] == 0.5


def test_one_detection_answers_for_one_object():
    scene = sample_scene(11, objects=1)
    doubled = type(scene)(scene.image, scene.caption, scene.objects * 2, scene.background, None, scene.phrases)
    assert judge_picture(doubled, scene.image).bound == 0.5


@pytest.mark.parametrize("image", [np.zeros((64, 64, 3)), np.zeros((32, 64, 3), np.uint8)])
def test_wrong_arrays_are_refused(image):
    with pytest.raises(ValueError, match="image: expected shape"):
        detect(image)
    with pytest.raises(TypeError, match="image: expected a numpy array"):
        detect("picture.png")
