"""The world: seeded, exact, its captions true, and its held-out pairs held out."""

from __future__ import annotations

import numpy as np
import pytest

from sdattn_fast.lab.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, sample_scene

SCENES = [sample_scene(seed) for seed in range(200)]


def test_the_same_seed_gives_the_same_scene():
    again = sample_scene(7)
    assert again.caption == SCENES[7].caption
    np.testing.assert_array_equal(again.image, SCENES[7].image)
    assert len({s.caption for s in SCENES}) > 150


def test_held_out_pairs_stand_in_no_training_scene_and_alone_in_the_others():
    assert not {(o.colour, o.shape) for s in SCENES for o in s.objects} & HELD_OUT
    held_out_pairs = {(o.colour, o.shape) for seed in range(100) for o in sample_scene(seed, held_out=True).objects}
    assert held_out_pairs == HELD_OUT
    for colour, shape in HELD_OUT:
        seen = {(o.colour, o.shape) for s in SCENES for o in s.objects}
        assert any(c == colour for c, _ in seen) and any(s == shape for _, s in seen)


def test_masks_are_exact():
    """Inside a mask stands its object's colour, away from edges; outside all masks, the background's."""
    from scipy.ndimage import binary_dilation, binary_erosion

    for scene in SCENES[:50]:
        everything = np.zeros((64, 64), dtype=bool)
        for thing in scene.objects:
            assert not (everything & thing.mask).any(), "objects overlap"
            everything |= thing.mask
            inside = binary_erosion(thing.mask, np.ones((3, 3)))
            assert (scene.image[inside] == COLOURS[thing.colour]).all()
        outside = ~binary_dilation(everything, np.ones((3, 3)), iterations=3)
        assert (scene.image[outside] == BACKGROUNDS[scene.background]).all()


def test_captions_name_every_object_and_relations_hold():
    relations = 0
    for scene in SCENES:
        for phrase in scene.phrases:
            assert scene.caption[phrase.start : phrase.end] == phrase.text
            if phrase.object is not None:
                thing = scene.objects[phrase.object]
                assert phrase.text.split()[-2:] == [thing.colour, thing.shape]
        assert [p.object for p in scene.phrases if p.object is not None] == list(range(len(scene.objects)))
        if scene.relation:
            relations += 1
            axis = 0 if scene.relation == "left of" else 1
            assert scene.objects[0].centre[axis] < scene.objects[1].centre[axis]
            assert scene.relation in scene.caption
    assert relations > 10


def test_shapes_colours_and_sizes_all_occur():
    things = [o for s in SCENES for o in s.objects]
    assert {o.shape for o in things} == set(SHAPES)
    assert {o.colour for o in things} == set(COLOURS)
    assert {o.size for o in things} == {"small", "large"}
    assert {len(s.objects) for s in SCENES} == {1, 2, 3}


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "seed: expected an int", {"seed": 1.0}),
        (ValueError, "seed: expected a number >= 0", {"seed": -1}),
        (ValueError, "objects: expected 1, 2, 3 or None", {"seed": 0, "objects": 4}),
    ],
)
def test_bad_input(error, match, arguments):
    with pytest.raises(error, match=match):
        sample_scene(**arguments)
