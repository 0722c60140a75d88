"""Captions of the shapes world: what they name, and which ones are chosen on and reported on."""

from __future__ import annotations

import re

from .world import COLOURS, SHAPES, ShapesScene, sample_scene

__all__ = ["HELD_OUT_SEED", "SELECTION_SEED", "held_out_scenes", "objects_of", "phrases_of", "words_of_objects"]

HELD_OUT_SEED = 50_000_000
SELECTION_SEED = 60_000_000


def objects_of(caption: str) -> list[tuple[str, str]]:
    """(colour, shape) of the objects that a caption of the world names, in its order."""
    return re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", caption.lower())


def words_of_objects(caption: str) -> list[str]:
    """The shape of each object, as `Maps.per_word` calls it: the second circle is "circle (2)"."""
    shapes = [shape for _, shape in objects_of(caption)]
    before = [shapes[:i].count(shape) for i, shape in enumerate(shapes)]
    return [shape if not n else f"{shape} ({n + 1})" for shape, n in zip(shapes, before, strict=True)]


def phrases_of(caption: str) -> list[str]:
    """ "a red circle" for each object."""
    return [f"a {colour} {shape}" for colour, shape in objects_of(caption)]


def held_out_scenes(count: int, held_out: bool = True, first: int = HELD_OUT_SEED) -> list[ShapesScene]:
    """Scenes of one, two and three objects by turns, whose pairs of colour and shape no training scene has; held_out
    False: of pairs seen in training, as every training scene. first: the first one's seed."""
    return [sample_scene(first + i, held_out=held_out, objects=1 + i % 3) for i in range(count)]
