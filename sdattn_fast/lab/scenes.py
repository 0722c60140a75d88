"""What both worlds draw their scenes with: checked seeds, choices, and places on a 2x2 grid."""

from __future__ import annotations

import numpy as np

__all__ = ["check_scene", "pick", "places"]


def check_scene(seed: object, objects: object, most: int) -> None:
    """Raises: TypeError, ValueError: a seed that is no int >= 0; objects that are neither None nor 1 to `most`."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed: expected a number >= 0, got {seed}")
    counts = range(1, most + 1)
    if objects not in (None, *counts):
        raise ValueError(f"objects: expected {', '.join(map(str, counts))} or None, got {objects!r}")


def places(rng: np.random.Generator, count: int, related: float) -> tuple[str | None, list[tuple[int, int]]]:
    """Slots (column, row) of a 2x2 grid, in the caption's order; two objects may stand in a named relation.

    related: the share of two objects that do; at 0 nothing is drawn for it.
    """
    if count == 2 and related and rng.random() < related:
        relation, other = pick(rng, ("left of", "above")), int(rng.integers(2))
        return relation, [(0, other), (1, other)] if relation == "left of" else [(other, 0), (other, 1)]
    slots = [(0, 0), (1, 0), (0, 1), (1, 1)]
    return None, [slots[i] for i in rng.permutation(4)[:count]]


def pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
