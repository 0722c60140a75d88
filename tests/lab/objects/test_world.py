"""The objects world: seeded, exact, its captions true; faults only where they are asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sdattn_fast.lab.objects.captions import report_scenes, selection_scenes
from sdattn_fast.lab.objects.faults import Faults, faulty_caption, faulty_naming
from sdattn_fast.lab.objects.sprites import COLOURED, HUES, NOUNS, dominant_hue, plural, sprite
from sdattn_fast.lab.objects.world import BACKGROUNDS, SIDE, NamedObjects, caption_of, sample_scene

SCENES = [sample_scene(seed) for seed in range(300)]


def test_the_same_seed_gives_the_same_scene():
    again = sample_scene(7)
    assert again.caption == SCENES[7].caption
    np.testing.assert_array_equal(again.image, SCENES[7].image)
    assert len({s.caption for s in SCENES}) > 250


def test_a_seed_gives_what_it_gave():
    """The weights that ship were trained on these scenes, and results are reported on them."""
    assert [s.caption for s in SCENES[:4]] == [
        "a car", "a sailboat and a cat on a black background", "a cactus",
        "a purple book, a rocket and a teddy bear on a beige background",
    ]  # fmt: skip


def test_masks_are_exact():
    """Outside of all masks and a pixel of blend stands the background, whose grades are small."""
    from scipy.ndimage import binary_dilation

    for scene in SCENES[:80]:
        everything = np.zeros((SIDE, SIDE), bool)
        for thing in scene.objects:
            around = binary_dilation(thing.mask, np.ones((3, 3)))
            assert not (everything & around).any(), "objects touch"
            everything |= thing.mask
            assert thing.mask.any()
        outside = scene.image[~binary_dilation(everything, np.ones((3, 3)), iterations=2)].astype(int)
        assert np.abs(outside - BACKGROUNDS[scene.background]).max() <= 25
        labels = scene.labels()
        assert ((labels > 0) == everything).all()
        assert {NOUNS[i - 1] for i in np.unique(labels[labels > 0])} == {thing.noun for thing in scene.objects}


def test_captions_are_true():
    relations = counts = 0
    for scene in SCENES:
        named = [index for phrase in scene.phrases for index in phrase.objects]
        assert named == list(range(len(scene.objects)))
        for phrase in scene.phrases:
            assert scene.caption[phrase.start : phrase.end] == phrase.text
            things = [scene.objects[i] for i in phrase.objects]
            counts += len(things) > 1
            for thing in things:
                assert phrase.text.endswith(plural(thing.noun) if len(things) > 1 else thing.noun)
                colours_said = [c for c in HUES if f" {c} " in phrase.text]
                assert colours_said in ([], [thing.colour])
            if not things:
                assert phrase.text == f"a {scene.background} background"
        if scene.relation:
            relations += 1
            axis = 0 if scene.relation == "left of" else 1
            assert scene.objects[0].centre[axis] < scene.objects[1].centre[axis]
    assert relations > 10 and counts > 10


def test_shares_of_counts():
    counts = Counter(len(s.objects) for s in SCENES)
    assert set(counts) == {1, 2, 3, 4} and counts[2] == max(counts.values())
    assert {len(sample_scene(i, objects=3).objects) for i in range(20)} == {3}


@pytest.mark.parametrize("noun", COLOURED)
@pytest.mark.parametrize("colour", HUES)
def test_a_colour_is_the_hue_that_is_seen(noun, colour):
    pixels = np.asarray(sprite(noun, colour))
    hue = dominant_hue(pixels[pixels[..., 3] >= 128][:, :3])
    assert hue is not None
    assert abs((hue - HUES[colour] + 180) % 360 - 180) < 15, (noun, colour, hue)


def test_gray_has_no_hue():
    assert dominant_hue(np.full((50, 3), 128, np.uint8)) is None
    assert dominant_hue(np.zeros((0, 3), np.uint8)) is None


def test_caption_of():
    named = [NamedObjects("apple", "red", 1), NamedObjects("owl", None, 2), NamedObjects("dress", "blue", 3)]
    text, phrases = caption_of(named, None, "white")
    assert text == "a red apple, two owls and three blue dresses on a white background"
    assert [p.objects for p in phrases] == [(0,), (1, 2), (3, 4, 5), ()]
    assert (
        caption_of([NamedObjects("owl", None, 1), NamedObjects("car", None, 1)], "left of")[0] == "an owl left of a car"
    )


def test_faults_have_their_shares():
    faults = Faults(phantom=0.3, omitted=0.2, swapped=0.4)
    changed = [faulty_caption(s, faults, i) != s.caption for i, s in enumerate(SCENES)]
    assert 0.25 < np.mean(changed) < 0.6
    assert all(faulty_caption(s, Faults(), i) == s.caption for i, s in enumerate(SCENES))
    assert [faulty_caption(s, faults, i) for i, s in enumerate(SCENES)] == [
        faulty_caption(s, faults, i) for i, s in enumerate(SCENES)
    ]


def test_what_a_faulty_caption_names() -> None:
    faults = Faults(phantom=0.5, omitted=0.2, swapped=0.4)
    for i, scene in enumerate(SCENES):
        caption, named = faulty_naming(scene, faults, i)
        assert caption == faulty_caption(scene, faults, i)
        background = f" on a {scene.background} background" if scene.caption.endswith(" background") else ""
        assert caption == caption_of(named, scene.relation if len(named) == 2 else None)[0] + background


def test_a_phantom_is_not_there_and_an_omission_is():
    for i, scene in enumerate(SCENES):
        there = {thing.noun for thing in scene.objects}
        assert len(_nouns(faulty_caption(scene, Faults(phantom=1), i)) - there) == 1
        left = _nouns(faulty_caption(scene, Faults(omitted=1), i))
        assert len(there - left) == (len(scene.named) > 1)
        assert left <= there


def test_a_swap_keeps_nouns_and_colours():
    swapped = 0
    for i, scene in enumerate(SCENES):
        caption = faulty_caption(scene, Faults(swapped=1), i)
        assert sorted(_words(caption)) == sorted(_words(scene.caption))
        swapped += caption != scene.caption
    assert swapped > 20


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"phantom": 1.5}, ValueError, r"^phantom: expected a number in \[0, 1\], got 1\.5$"),
        ({"swapped": "much"}, TypeError, r"^swapped: expected a number in \[0, 1\], got str$"),
        ({"omitted": True}, TypeError, r"^omitted: expected a number in \[0, 1\], got bool$"),
        ({"omitted": float("nan")}, ValueError, r"^omitted: expected a number in \[0, 1\], got nan$"),
    ],
)
def test_bad_faults(keywords, error, message):
    with pytest.raises(error, match=message):
        Faults(**keywords)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((-1,), {}, ValueError, r"^seed: expected a number >= 0, got -1$"),
        ((1.5,), {}, TypeError, r"^seed: expected an int, got float$"),
        ((1,), {"objects": 5}, ValueError, r"^objects: expected 1, 2, 3, 4 or None, got 5$"),
    ],
)
def test_bad_scenes(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        sample_scene(*arguments, **keywords)


def test_bad_sprites():
    with pytest.raises(ValueError, match=r"^noun: expected one of apple, .*, got 'unicorn'$"):
        sprite("unicorn")
    with pytest.raises(ValueError, match=r"^colour: expected None or, for apple, .*, got 'red'$"):
        sprite("owl", "red")
    with pytest.raises(ValueError, match=r"one of red, .*, got 'mauve'$"):
        sprite("apple", "mauve")


def test_captions_to_choose_on_and_to_report_on_are_apart():
    chosen, reported = ({s.caption for s in scenes(60)} for scenes in (selection_scenes, report_scenes))
    assert not chosen & reported
    assert [len(s.objects) for s in report_scenes(6)] == [2, 3, 4, 2, 3, 4]


def _nouns(caption: str) -> set[str]:
    words = f" {caption.replace(',', '')} "
    return {noun for noun in NOUNS if f" {noun} " in words or f" {plural(noun)} " in words}


def _words(caption: str) -> list[str]:
    """Without articles, which go by the next word's first letter."""
    return [word for word in caption.replace(",", "").split() if word not in ("a", "an")]
