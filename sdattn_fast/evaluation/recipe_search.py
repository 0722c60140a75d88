"""Recipes chosen on some prompts and compared on others: which are tried, and which of them is the best of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..guidance.recipe import Recipe
from .conditions import STOCK

__all__ = ["KINDS", "chosen_recipes", "recipe_grid"]

# Kind -> the measures whose mean it is chosen by.
KINDS: Mapping[str, tuple[str, ...]] = {
    "objects": ("present",),
    "binding": ("bound",),
    "both": ("present", "bound"),
    "fast": ("present", "bound"),
}
_WEIGHTS = {"objects": (1.0, 0.0), "binding": (0.0, 1.0), "both": (1.0, 0.3)}
_FAST = 3  # corrections after every third step, or fewer


def recipe_grid(
    strengths: Sequence[float] = (0.02, 0.05, 0.1, 0.2), every: Sequence[int] = (1, 3), until: float = 0.5
) -> dict[str, Recipe]:
    """Normalized recipes of each kind at each strength, by names that say how they are set.

    Args:
        strengths: root mean square of a change of the latents. every: as in `Recipe`; the kind "fast" is those that act
            after every third step or less often. until: as in `Recipe`.

    Raises: as `Recipe`.
    """
    return {
        f"{kind}, strength {strength:g}, every {nth}": Recipe(
            presence, binding, strength=strength, normalize=True, until=until, every=nth
        )
        for kind, (presence, binding) in _WEIGHTS.items()
        for nth in every
        for strength in strengths
    }


def chosen_recipes(results: Mapping[str, Sequence[Mapping[str, float]]], grid: Mapping[str, Recipe]) -> dict[str, str]:
    """Kind -> the name of the best recipe of the grid, or "stock" where none is better than that.

    Args:
        results: condition -> of every prompt, its measures, as `Evaluation.results` gives them; with stock.

    Raises: ValueError where a recipe was not drawn.
    """
    missing = [name for name in (STOCK, *grid) if name not in results]
    if missing:
        raise ValueError(f"results: expected stock and every recipe of the grid, and there is no {missing[0]!r}")
    return {
        kind: max((STOCK, *_of_kind(kind, grid)), key=lambda name: _mean(results[name], measures))
        for kind, measures in KINDS.items()
    }


def _of_kind(kind: str, grid: Mapping[str, Recipe]) -> list[str]:
    if kind == "fast":
        return [name for name, recipe in grid.items() if recipe.every >= _FAST]
    wanted = _WEIGHTS[kind]
    return [name for name, recipe in grid.items() if (recipe.presence, recipe.binding) == wanted]


def _mean(rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> float:
    return float(np.nanmean([[row[measure] for measure in measures] for row in rows]))
