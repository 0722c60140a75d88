"""The objects world: 64x64 scenes of one to four pictograms, their captions, and the exact mask of each object.

Seeded and unlimited. Captions here are true; what training makes of them is in `faults`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..scenes import check_scene, pick, places
from .sprites import COLOURED, HUES, NOUNS, SPRITE_SIDE, plural, sprite

__all__ = [
    "BACKGROUNDS", "NUMBERS", "SIDE", "SMALLEST_SIDE", "NamedObjects", "ObjectsPhrase", "ObjectsScene",
    "PlacedPictogram", "caption_of", "sample_scene",
]  # fmt: skip

SIDE = 64
BACKGROUNDS = {"white": (244, 244, 244), "gray": (140, 140, 140), "black": (22, 22, 22), "beige": (226, 206, 170)}
NUMBERS = {2: "two", 3: "three"}

_COUNT_SHARES = (0.25, 0.4, 0.2, 0.15)
_SIZES = {1: (24, 40), 2: (21, 29), 3: (21, 29), 4: (21, 29)}
SMALLEST_SIDE = min(smallest for smallest, _ in _SIZES.values())


@dataclass(frozen=True)
class PlacedPictogram:
    """One pictogram: its noun, its colour (None for nouns of one look), centre (x, y) and side in pixels, and its mask,
    (64, 64) bool."""

    noun: str
    colour: str | None
    centre: tuple[float, float]
    side: int
    mask: np.ndarray


@dataclass(frozen=True)
class NamedObjects:
    """What a caption names by one phrase: `count` objects of a noun, in a colour or (None) in whichever."""

    noun: str
    colour: str | None
    count: int


@dataclass(frozen=True)
class ObjectsPhrase:
    """A noun phrase of the caption: its text, where it stands (start, end), and the indices of the objects that it
    names; none for the background."""

    text: str
    start: int
    end: int
    objects: tuple[int, ...]


@dataclass(frozen=True)
class ObjectsScene:
    """A picture (64, 64, 3) uint8, its caption, objects in the caption's order, background name, relation ("left of",
    "above" or None), noun phrases, and what the caption names."""

    image: np.ndarray
    caption: str
    objects: tuple[PlacedPictogram, ...]
    background: str
    relation: str | None
    phrases: tuple[ObjectsPhrase, ...]
    named: tuple[NamedObjects, ...]

    def labels(self) -> np.ndarray:
        """(64, 64) uint8: 0 for background, 1 + the index in `NOUNS` of the object at that pixel."""
        labels = np.zeros((SIDE, SIDE), np.uint8)
        for thing in self.objects:
            labels[thing.mask] = 1 + NOUNS.index(thing.noun)
        return labels


def sample_scene(seed: int, *, objects: int | None = None) -> ObjectsScene:
    """The scene of that seed.

    Args:
        seed: >= 0; the same seed gives the same scene on every machine.
        objects: 1 to 4; None: drawn (25, 40, 20 and 15 %).

    Raises:
        TypeError, ValueError: seed or objects out of range.
    """
    check_scene(seed, objects, 4)
    rng = np.random.default_rng((int(seed), 7))
    count = objects or int(rng.choice((1, 2, 3, 4), p=_COUNT_SHARES))
    background = pick(rng, tuple(BACKGROUNDS))
    named = _named(rng, count)
    relation, slots = places(rng, count, 0.3 if len(named) == 2 else 0.0)

    canvas = _background(rng, background)
    placed: list[PlacedPictogram] = []
    for item in named:
        for _ in range(item.count):
            placed.append(_place(rng, canvas, item, slots[len(placed)], count))
    captioned = [
        NamedObjects(item.noun, item.colour if item.colour and rng.random() < 0.8 else None, item.count)
        for item in named
    ]
    shown = background if rng.random() < 0.4 else None
    caption, phrases = caption_of(captioned, relation, shown)
    return ObjectsScene(np.asarray(canvas), caption, tuple(placed), background, relation, phrases, tuple(captioned))


def caption_of(
    named: Sequence[NamedObjects], relation: str | None = None, background: str | None = None
) -> tuple[str, tuple[ObjectsPhrase, ...]]:
    """ "a red car and two owls on a white background", and its noun phrases."""
    text, phrases, first = "", [], 0

    def add(phrase: str, objects: tuple[int, ...]) -> None:
        nonlocal text
        phrases.append(ObjectsPhrase(phrase, len(text), len(text) + len(phrase), objects))
        text += phrase

    for index, item in enumerate(named):
        if index:
            text += f" {relation} " if relation else " and " if index == len(named) - 1 else ", "
        noun = plural(item.noun) if item.count > 1 else item.noun
        noun = f"{item.colour} {noun}" if item.colour else noun
        article = "an" if noun[0] in "aeiou" else "a"
        add(f"{NUMBERS[item.count] if item.count > 1 else article} {noun}", tuple(range(first, first + item.count)))
        first += item.count
    if background:
        text += " on "
        add(f"a {background} background", ())
    return text, tuple(phrases)


def _named(rng: np.random.Generator, count: int) -> list[NamedObjects]:
    """Different nouns, of which one may stand there several times."""
    several = 1
    if count > 1 and rng.random() < 0.2:
        several = int(rng.integers(2, min(count, 3) + 1))
    counts = [several] + [1] * (count - several)
    rng.shuffle(counts)
    nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))[: len(counts)]]
    colours = [tuple(HUES)[i] for i in rng.permutation(len(HUES))]
    return [
        NamedObjects(noun, colours.pop() if noun in COLOURED else None, many)
        for noun, many in zip(nouns, counts, strict=True)
    ]


def _place(
    rng: np.random.Generator, canvas: Image.Image, item: NamedObjects, slot: tuple[int, int], count: int
) -> PlacedPictogram:
    """One pictogram on the canvas: in its quarter of the picture and clear of its border, or anywhere where it is
    alone."""
    smallest, largest = _SIZES[count]
    side = int(rng.integers(smallest, largest + 1))
    if count == 1:
        x, y = (int(rng.integers(SIDE - side + 1)) for _ in range(2))
    else:
        x, y = (32 * s + 1 + int(rng.integers(31 - side)) for s in slot)
    small = sprite(item.noun, item.colour).resize((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
    if rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas.paste(small, (x, y), small)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y : y + side, x : x + side] = np.asarray(small)[..., 3] >= 128
    return PlacedPictogram(item.noun, item.colour, (x + side / 2, y + side / 2), side, mask)


def _background(rng: np.random.Generator, name: str) -> Image.Image:
    """One colour, or in half of the scenes a grade of up to 24 levels from one side to the other."""
    picture = np.empty((SIDE, SIDE, 3))
    picture[:] = BACKGROUNDS[name]
    if rng.random() < 0.5:
        across, down = rng.uniform(-12, 12, 2)
        ramp = np.linspace(-1, 1, SIDE)
        picture += (across * ramp[None, :] + down * ramp[:, None])[..., None]
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


assert SPRITE_SIDE >= max(largest for _, largest in _SIZES.values())
