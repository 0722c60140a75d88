"""The shapes world: 64x64 scenes of one to three coloured shapes, their captions, and the exact mask of each object.

Seeded and unlimited. Some colour-shape pairs (`HELD_OUT`) never stand in a training scene; evaluation asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..scenes import check_scene, pick, places

__all__ = [
    "BACKGROUNDS", "COLOURS", "HELD_OUT", "SHAPES", "SIDE", "SIZES", "PlacedShape", "ShapesPhrase", "ShapesScene",
    "sample_scene",
]  # fmt: skip

SIDE = 64
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 7.0, "large": 12.5}
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 215, 50),
    "purple": (150, 60, 185),
    "orange": (245, 140, 30),
    "cyan": (70, 205, 225),
    "pink": (250, 150, 190),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15), "brown": (105, 70, 40)}
HELD_OUT = frozenset(
    {
        ("red", "star"), ("green", "square"), ("blue", "triangle"), ("yellow", "circle"), ("purple", "square"),
        ("orange", "triangle"), ("cyan", "star"), ("pink", "circle"),
    }
)  # fmt: skip

_SUPERSAMPLE = 4


@dataclass(frozen=True)
class PlacedShape:
    """One shape: names, centre (x, y) and circumradius in pixels, and its mask, (64, 64) bool."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]
    radius: float
    mask: np.ndarray


@dataclass(frozen=True)
class ShapesPhrase:
    """A noun phrase of the caption: its text, where it stands (start, end), and which object it names (None: the
    background)."""

    text: str
    start: int
    end: int
    object: int | None


@dataclass(frozen=True)
class ShapesScene:
    """A picture (64, 64, 3) uint8, its caption, objects in the caption's order, background name and noun phrases."""

    image: np.ndarray
    caption: str
    objects: tuple[PlacedShape, ...]
    background: str
    relation: str | None
    phrases: tuple[ShapesPhrase, ...]


def sample_scene(seed: int, *, held_out: bool = False, objects: int | None = None) -> ShapesScene:
    """The scene of that seed.

    Args:
        seed: >= 0; the same seed gives the same scene on every machine.
        held_out: False: a training scene, without any pair of `HELD_OUT`; True: every object is such a pair.
        objects: 1, 2 or 3; None: drawn (30, 50 and 20 %).

    Raises:
        TypeError, ValueError: seed or objects out of range.
    """
    check_scene(seed, objects, 3)
    rng = np.random.default_rng((int(seed), int(held_out)))
    count = objects or int(rng.choice((1, 2, 3), p=(0.3, 0.5, 0.2)))
    background = pick(rng, tuple(BACKGROUNDS))
    relation, slots = places(rng, count, 0.4)

    placed: list[PlacedShape] = []
    for slot in slots:
        colour, shape = _pair(rng, held_out, [o.colour for o in placed])
        size = pick(rng, tuple(SIZES))
        radius = SIZES[size] * rng.uniform(0.93, 1.07)
        room = 15.5 - radius
        x, y = (16 + 32 * s + rng.uniform(-room, room) for s in slot)
        placed.append(PlacedShape(shape, colour, size, (x, y), radius, _mask(shape, x, y, radius) >= 0.5))

    image = np.empty((SIDE, SIDE, 3))
    image[:] = BACKGROUNDS[background]
    for thing in placed:
        cover = _mask(thing.shape, *thing.centre, thing.radius)[..., None]
        image = image * (1 - cover) + np.array(COLOURS[thing.colour]) * cover
    caption, phrases = _caption(rng, placed, background, relation)
    return ShapesScene(np.rint(image).astype(np.uint8), caption, tuple(placed), background, relation, phrases)


def _pair(rng: np.random.Generator, held_out: bool, taken: Sequence[str]) -> tuple[str, str]:
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == held_out and c not in taken]
    return pairs[int(rng.integers(len(pairs)))]


def _caption(
    rng: np.random.Generator, objects: Sequence[PlacedShape], background: str, relation: str | None
) -> tuple[str, tuple[ShapesPhrase, ...]]:
    text, phrases = "", []

    def add(phrase: str, index: int | None) -> None:
        nonlocal text
        phrases.append(ShapesPhrase(phrase, len(text), len(text) + len(phrase), index))
        text += phrase

    for index, thing in enumerate(objects):
        if index:
            text += f" {relation} " if relation else " and " if index == len(objects) - 1 else ", "
        size = f"{thing.size} " if rng.random() < 0.75 else ""
        noun = f"{size}{thing.colour} {thing.shape}"
        add(f"{'an' if noun[0] in 'aeio' else 'a'} {noun}", index)
    if rng.random() < 0.85:
        text += " on "
        add(f"a {background} background", None)
    return text, tuple(phrases)


def _mask(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Share of each pixel that the shape covers, (64, 64) in [0, 1]."""
    s = _SUPERSAMPLE
    canvas = Image.new("L", (SIDE * s, SIDE * s))
    draw = ImageDraw.Draw(canvas)
    if shape == "circle":
        r = 0.92 * radius
        draw.ellipse([(x - r) * s, (y - r) * s, (x + r) * s, (y + r) * s], fill=1)
    else:
        draw.polygon([(px * s, py * s) for px, py in _corners(shape, x, y, radius)], fill=1)
    cover = np.asarray(canvas, dtype=np.float64).reshape(SIDE, s, SIDE, s)
    return cover.mean((1, 3))


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "square":
        r = 0.84 * radius
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x + radius * math.sin(a), y + 0.15 * radius - radius * math.cos(a)) for a in _turns(3)]
    radii = (1.08 * radius, 0.45 * radius)
    return [(x + radii[i % 2] * math.sin(a), y - radii[i % 2] * math.cos(a)) for i, a in enumerate(_turns(10))]


def _turns(count: int) -> list[float]:
    return [2 * math.pi * i / count for i in range(count)]
