"""What the detector of a world finds in a picture, as a line of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

__all__ = ["detected_text"]


def detected_text(world: str) -> Callable[[np.ndarray], str]:
    """A function of a picture (64, 64, 3) uint8 that gives what the world's detector finds, such as "red circle, blue
    square", or "nothing".

    Raises: ImportError where the objects world's detector is not installed.
    """
    if world == "shapes":
        from .shapes.detector import detect

        return lambda picture: _listed(f"{found.colour} {found.shape}" for found in detect(picture))
    from .objects.detector import PictogramDetector

    detector = PictogramDetector.load()
    return lambda picture: _listed(
        found.noun if found.colour is None else f"{found.colour} {found.noun}" for found in detector([picture])[0]
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
