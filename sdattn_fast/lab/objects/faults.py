"""Captions as the web has them: the faults that a training caption may have, by design.

A model that is trained on such captions can draw every object, and has learnt that a caption is not always true. What
it is in doubt of it neglects or swaps, as Stable Diffusion does; that is what attention control is to cure.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from .sprites import COLOURED, HUES, NOUNS
from .world import NamedObjects, ObjectsScene, caption_of

__all__ = ["Faults", "faulty_caption", "faulty_naming"]


@dataclass(frozen=True)
class Faults:
    """Shares of captions, each in [0, 1], that have a fault; one caption may have several.

    phantom: names an object that is not in the picture. omitted: leaves out one of several that are. swapped: gives a
    colour to another noun that can have one, where there are two such nouns.

    Raises: TypeError, ValueError: a share that is no number, or out of range.
    """

    phantom: float = 0.0
    omitted: float = 0.0
    swapped: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name}: expected a number in [0, 1], got {type(value).__name__}")
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name}: expected a number in [0, 1], got {value}")


def faulty_caption(scene: ObjectsScene, faults: Faults, seed: int) -> str:
    """The caption of a scene with the faults that this seed draws; the true one where it draws none."""
    return faulty_naming(scene, faults, seed)[0]


def faulty_naming(scene: ObjectsScene, faults: Faults, seed: int) -> tuple[str, list[NamedObjects]]:
    """`faulty_caption`, and what it names."""
    rng = np.random.default_rng((seed, 11))
    omits, invents, swaps = rng.random(3) < (faults.omitted, faults.phantom, faults.swapped)
    if not (omits or invents or swaps):
        return scene.caption, list(scene.named)
    named = list(scene.named)
    if swaps:
        named = _swapped(named, rng)
    if omits and len(named) > 1:
        del named[int(rng.integers(len(named)))]
    if invents:
        others = [noun for noun in NOUNS if noun not in {item.noun for item in scene.named}]
        noun = others[int(rng.integers(len(others)))]
        colour = tuple(HUES)[int(rng.integers(len(HUES)))] if noun in COLOURED and rng.random() < 0.8 else None
        named.insert(int(rng.integers(len(named) + 1)), NamedObjects(noun, colour, 1))
    relation = scene.relation if len(named) == 2 else None
    shown = scene.background if scene.caption.endswith(" background") else None
    return caption_of(named, relation, shown)[0], named


def _swapped(named: list[NamedObjects], rng: np.random.Generator) -> list[NamedObjects]:
    able = [i for i, item in enumerate(named) if item.noun in COLOURED]
    if len(able) < 2:
        return named
    first, second = rng.permutation(able)[:2]
    swapped = list(named)
    swapped[first] = replace(named[first], colour=named[second].colour)
    swapped[second] = replace(named[second], colour=named[first].colour)
    return swapped
