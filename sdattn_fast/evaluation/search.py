"""Settings of techniques, recipes and peers: which are tried on some captions, and which is the best of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..guidance.recipe import Recipe
from ..program import Capture, Program, Refinement, SalienceDropout
from .conditions import NOT_TECHNIQUES, STOCK, Condition, conditions, recipe_condition
from .peers import AttendAndExcite, Peer, SynGen

__all__ = [
    "RECIPES_SCORE", "RESOLUTIONS", "SCALES", "STRENGTHS", "Kind", "alternative_kinds", "peer_kinds", "recipe_kinds",
    "technique_kinds",
]  # fmt: skip

STRENGTHS = (0.05, 0.1, 0.2)  # of recipes, normalized
RECIPES_SCORE = "recipe's score"  # the kind of alternatives that has it
SCALES, RESOLUTIONS = (2.0, 8.0, 20.0), (16, 8)  # of peers

# The share of the steps, how many corrections in it, and the strengths as shares of those that are asked for: of many
# corrections each is weaker.
_SCHEDULES = ((0.25, 4, 1.0), (0.15, 2, 1.0), (0.35, 6, 0.8))
_WEAKER = ((0.02, 10), (0.03, 10))  # strengths, and how many corrections
_STOCK = Condition(STOCK, STOCK)
# The recipe whose weights are searched with -> the measures whose mean it is chosen by.
_RECIPES: Mapping[str, tuple[str, ...]] = {
    "objects": ("present",),
    "binding": ("bound",),
    "both": ("present", "bound"),
}


@dataclass(frozen=True)
class Kind:
    """Conditions of which the best, by the mean of the measures over all prompts, is reported.

    or_stock: stock is the best of them where none is better.
    """

    name: str
    conditions: Sequence[Condition]
    measures: Sequence[str]
    or_stock: bool = True

    def ranked(self, results: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Condition]:
        """Those conditions that were drawn, the best first. results: of each, and of stock, every prompt's measures.

        Raises: ValueError where none was drawn.
        """
        candidates = [_STOCK, *self.conditions] if self.or_stock else self.conditions
        candidates = [c for c in candidates if c.name in results]
        if not candidates:
            raise ValueError(f"results: expected those of a condition of {self.name!r}, got none")
        return sorted(candidates, key=lambda c: _mean(results[c.name], self.measures), reverse=True)


def technique_kinds() -> list[Kind]:
    """The techniques alone, each at several settings, but selective maps, which change no picture."""
    kinds: dict[str, list[Condition]] = {}
    for condition in conditions():
        if condition.technique not in NOT_TECHNIQUES | {"selective maps"}:
            kinds.setdefault(condition.technique, []).append(condition)

    def programs(name: str, programs: Mapping[str, Program]) -> list[Condition]:
        return [Condition(f"{name}, {setting}", name, program=program) for setting, program in programs.items()]

    # These have settings of their own to search.
    dropout = {
        f"{mode} {ratio:g}": Program(SalienceDropout(ratio, mode=mode), renormalize="content")
        for mode in ("topk", "random")
        for ratio in (0.05, 0.1, 0.2)
    }
    nms = {
        f"axis {axis}, threshold {threshold:g}": Program(
            refine=Refinement(threshold=threshold, axis=axis), renormalize="content"
        )
        for axis in ("token", "space")
        for threshold in (0.1, 0.3, 0.7)
    }
    kinds["salience dropout"] = programs("salience dropout", dropout)
    kinds["NMS with smoothing"] = programs("NMS with smoothing", nms)
    kinds["GradCAM"] = [
        Condition(f"GradCAM, {how} {strength:g}", "GradCAM", correct={"how": how, "strength": strength})
        for how, strengths in (("gradient", (0.02, 0.05, 0.1)), ("reweight", (0.5, 1.0)))
        for strength in strengths
    ]
    return [Kind(name, searched, ("present", "bound"), or_stock=False) for name, searched in kinds.items()]


def recipe_kinds(strengths: Sequence[float] = STRENGTHS) -> list[Kind]:
    """Normalized recipes of each kind, at each strength (root mean square of a change), with four corrections in the
    first quarter of the steps, two in the first 15 %, or six in the first 35 %, of 0.8 of the strength. And two fast
    ones: "objects" with one correction in the first 10 %, and with five of 0.7 of the strength in the first 30 %, which
    look at the maps of down blocks alone.

    Raises: as `Recipe`.
    """

    def tried(kind: str, share: float, corrections: int, weaker: float, layers: str | None = None) -> list[Condition]:
        recipes = [
            replace(
                Recipe.named(kind), strength=round(weaker * strength, 6), until=share, corrections=corrections,
                layers=layers,
            )
            for strength in strengths
        ]  # fmt: skip
        said = f"{corrections} correction{'s' if corrections > 1 else ''}{', down blocks' if layers else ''}"
        return [recipe_condition(f"{kind}, strength {one.strength:g}, {said}", one) for one in recipes]

    kinds = [
        Kind(f"recipe, {kind}", [one for schedule in _SCHEDULES for one in tried(kind, *schedule)], measures)
        for kind, measures in _RECIPES.items()
    ]
    fast = {"fast": tried("objects", 0.1, 1, 1.0), "down blocks": tried("objects", 0.3, 5, 0.7, "down_blocks.*")}
    return [*kinds, *(Kind(f"recipe, {name}", tried_ones, _RECIPES["objects"]) for name, tried_ones in fast.items())]


def alternative_kinds() -> list[Kind]:
    """What the recipes do not use, each at several settings: other scores, alone and beside the recipe's, with four
    corrections and with ten weaker ones; relevance that is reused for three steps; and biases made of the last
    step's maps. The recipe's own score with ten weaker corrections is the first kind."""
    recipe = {"presence": 1.0, "segregation": 1.0}

    def kind(name: str, conditions: Sequence[Condition]) -> Kind:
        return Kind(name, conditions, ("present", "bound"), or_stock=False)

    def moved(name: str, setting: str, score: Mapping[str, float], strength: float, corrections: int) -> Condition:
        learned: dict[str, Any] = {"patch": {"capture": Capture(layers="*")}, "needs": ("network",)}
        return Condition(
            f"{name}, {setting}strength {strength:g}, {corrections} corrections", "alternative", score=score,
            correct={"how": "gradient", "strength": strength, "steps": (0, corrections)},
            **(learned if "learned" in score else {}),
        )  # fmt: skip

    def scored(name: str, score: str) -> Kind:
        scores = {"alone, ": {score: 1.0}, **{f"weight {w:g}, ": {**recipe, score: w} for w in (0.5, 2.0)}}
        schedules = ((0.05, 4), *_WEAKER)
        return kind(name, [moved(name, said, of, *acting) for said, of in scores.items() for acting in schedules])

    reweighted = [
        Condition(
            f"relevance, reused, strength {strength:g}, of {' and '.join(score)}", "alternative", score=score,
            correct={"how": "reweight", "strength": strength, "steps": (0, 10), "every": 3},
        )
        for score in (recipe, {"presence": 1.0})
        for strength in (0.5, 1.0)
    ]  # fmt: skip

    def biased(how: str) -> Kind:
        return kind(
            f"bias, {how}",
            [
                Condition(
                    f"bias, {how}, strength {strength:g}, {end} steps", "alternative",
                    patch={"capture": Capture(steps="latest")},
                    bias={"how": how, "strength": strength, "steps": (0, end)},
                )
                for end, strength in ((4, 1.0), (4, 2.0), (4, 4.0), (10, 0.5), (10, 1.0))
            ],
        )  # fmt: skip

    return [
        kind(RECIPES_SCORE, [moved(RECIPES_SCORE, "", recipe, *acting) for acting in _WEAKER]),
        scored("concentration", "concentration"),
        scored("learned presence", "learned"),
        kind("relevance, reused", reweighted),
        biased("weak"),
        biased("parted"),
    ]


def peer_kinds(scales: Sequence[float] = SCALES, resolutions: Sequence[int] = RESOLUTIONS) -> list[Kind]:
    """Attend-and-Excite and SynGen with each step size at each side of the attention."""

    def kind(peer: type[AttendAndExcite] | type[SynGen], name: str, *measures: str) -> Kind:
        searched: list[Peer] = [
            peer(scale, side, name=f"{name}, {side}x{side}, scale {scale:g}")
            for side in resolutions
            for scale in scales
        ]
        return Kind(name, [Condition(p.name, "peer", peer=p) for p in searched], measures, or_stock=False)

    return [kind(AttendAndExcite, "Attend-and-Excite", "present"), kind(SynGen, "SynGen", "present", "bound")]


def _mean(rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> float:
    return float(np.nanmean([[row[measure] for measure in measures] for row in rows]))
