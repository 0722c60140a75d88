"""The detector that ships finds what is there in true scenes, and nothing else; it refuses what is no picture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from sdattn_fast.lab.objects.detector import PictogramDetector, roughened
from sdattn_fast.lab.objects.world import BACKGROUNDS, SIDE, sample_scene

SCENES = [sample_scene(800_000_000 + seed) for seed in range(200)]


@pytest.fixture(scope="module")
def detector():
    return PictogramDetector.load()


@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_true_scenes(detector, blur):
    pictures = [gaussian_filter(s.image, (blur, blur, 0)) for s in SCENES]
    detections = detector(pictures)
    nouns = [Counter(o.noun for o in s.objects) for s in SCENES]
    seen = [Counter(d.noun for d in things) for things in detections]
    there = sum(n.total() for n in nouns)
    assert sum((n & s).total() for n, s in zip(nouns, seen, strict=True)) >= 0.99 * there
    assert sum((s - n).total() for n, s in zip(nouns, seen, strict=True)) <= 0.01 * there
    coloured = [Counter((o.noun, o.colour) for o in s.objects if o.colour) for s in SCENES]
    bound = [Counter((d.noun, d.colour) for d in things) for things in detections]
    total = sum(c.total() for c in coloured)
    assert sum((c & b).total() for c, b in zip(coloured, bound, strict=True)) >= 0.98 * total


def test_masks(detector):
    overlaps = []
    for scene, things in zip(SCENES[:60], detector([s.image for s in SCENES[:60]]), strict=True):
        for thing in things:
            fits = [(thing.mask & o.mask).sum() / (thing.mask | o.mask).sum() for o in scene.objects]
            overlaps.append(max(fits))
    assert np.median(overlaps) > 0.9


def test_nothing_is_found_in_nothing(detector):
    blank = [np.full((SIDE, SIDE, 3), level, np.uint8) for level in BACKGROUNDS.values()]
    noise = [np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for i in range(4)]
    assert detector(blank + noise) == [[]] * 8
    assert detector([]) == []


def test_half_an_object_is_none(detector):
    """An object of which the left half is missing is not counted, or the judge would reward fragments."""
    alone = [s for s in (sample_scene(i, objects=1) for i in range(60)) if s.objects[0].side < 26]
    cut = []
    for scene in alone:
        picture, middle = scene.image.copy(), int(scene.objects[0].centre[0])
        picture[:, : middle + 3] = scene.image[0, 0] if scene.objects[0].centre[1] > 20 else scene.image[-1, 0]
        cut.append(picture)
    detections = [[d.noun for d in things] for things in detector(cut)]
    counted = [s.objects[0].noun in nouns for s, nouns in zip(alone, detections, strict=True)]
    assert np.mean(counted) < 0.1


def test_roughened_pictures_are_pictures():
    pictures = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    rough = roughened(pictures, torch.Generator().manual_seed(0))
    assert rough.shape == pictures.shape and rough.abs().max() <= 1 and rough.isfinite().all()
    assert torch.equal(rough, roughened(pictures, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        ([[0]], TypeError, r"^pictures\[0\]: expected a numpy array, got list$"),
        (np.zeros((64, 64, 3)), ValueError, r"^pictures\[0\]: expected shape \(64, 64, 3\) uint8, got .* float64$"),
        (np.zeros((32, 64, 3), np.uint8), ValueError, r"^pictures\[0\]: .*, got \(32, 64, 3\) uint8$"),
    ],
)
def test_bad_pictures(detector, picture, error, message):
    with pytest.raises(error, match=message):
        detector([picture])
