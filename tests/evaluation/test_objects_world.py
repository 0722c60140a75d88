"""The objects world as a subject: every caption's things are found, and true pictures get full marks."""

from __future__ import annotations

import numpy as np
import pytest

from sdattn_fast.evaluation.objects_world import ObjectsWorld, object_phrases
from sdattn_fast.guidance.phrases import find_phrases
from sdattn_fast.lab.objects.captions import report_scenes
from sdattn_fast.lab.objects.detector import PictogramDetection
from sdattn_fast.lab.objects.model import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def world():
    scenes = report_scenes(160)
    true = {scene.image.tobytes(): scene for scene in scenes}

    def detector(pictures):
        return [
            [PictogramDetection(o.noun, o.colour, o.centre, o.mask) for o in true[picture.tobytes()].objects]
            for picture in pictures
        ]

    return ObjectsWorld(scenes, detector)


def test_phrases_are_those_of_the_things(world, tokenizer):
    for index, scene in enumerate(world.scenes):
        of_all, of_things = world.phrases(index, tokenizer)
        assert [p.text for p in of_things] == [p.text for p in scene.phrases if p.objects]
        assert set(of_things) <= set(of_all)
        for phrase, item in zip(of_things, scene.named, strict=True):
            assert phrase.head.text.rstrip("es").startswith(item.noun.split()[-1].rstrip("es"))


def test_true_pictures_are_right(world):
    indices = range(20)
    pictures = [world.scenes[i].image for i in indices]
    maps = [
        [np.logical_or.reduce([world.scenes[i].objects[o].mask for o in phrase.objects]).astype(float)
         for phrase in world.scenes[i].phrases if phrase.objects]
        for i in indices
    ]  # fmt: skip
    for row in world.measure(indices, pictures, maps):
        assert row["present"] == row["bound"] == row["all right"] == row["pointing"] == 1
        assert row["relation"] in (1, pytest.approx(np.nan, nan_ok=True))
        assert row["map IoU"] == 1
    without = world.measure([0], pictures[:1], [None])[0]
    assert np.isnan(without["map IoU"]) and np.isnan(without["pointing"]) and without["present"] == 1
    assert tuple(without) == world.measures


def test_a_wrong_map_points_elsewhere(world):
    scene = world.scenes[0]
    maps = [1.0 - np.logical_or.reduce([o.mask for o in scene.objects]) for _ in scene.named]
    row = world.measure([0], [scene.image], [maps])[0]
    assert row["map IoU"] == 0 and row["pointing"] == 0


def test_phrases_that_are_missing_are_said(tokenizer, world):
    scene = world.scenes[0]
    with pytest.raises(ValueError, match=r"^found: expected the noun phrases of '.*', got \['"):
        object_phrases(scene, find_phrases(scene.caption, tokenizer)[1:])


def test_a_prompts_picture_is_judged_by_its_own_scene():
    from sdattn_fast.evaluation.world_subjects import bound_objects_of, world_subject

    chosen, reported = world_subject("objects", 3, choosing=True), world_subject("objects", 3)
    judge = bound_objects_of(chosen, reported)
    prompts = [reported.prompts[2], chosen.prompts[0], chosen.prompts[0]]
    pictures = [reported.scenes[2].image, chosen.scenes[0].image, np.full((64, 64, 3), 128, np.uint8)]
    assert judge(prompts, pictures).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(KeyError):
        judge(["a dog"], pictures[:1])
