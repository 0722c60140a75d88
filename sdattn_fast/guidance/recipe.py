"""`Recipe`: corrections with settings that go together, by name, for `sdattn_fast.apply(pipe, recipe=...)`."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..program import Program, finite_number, layer_patterns

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What `sdattn_fast.apply(pipe, recipe=...)` does with every picture that the pipeline draws.

    It finds the noun phrases of the call's prompts, and after some of the steps moves the latents towards a higher
    score of the attention to them: `presence` times `Presence` plus `segregation` times `Segregation` plus `binding`
    times `Binding`.

    On our small test model "objects" raised the share of objects drawn from 0.757 by 0.100 for 1.51 of the time, and
    "fast" by 0.041 for 1.08; Attend-and-Excite of diffusers raised it by 0.061 for 2.55 (docs/objects.md).

    Args:
        presence: Weight of `Presence` of the objects, >= 0: each is to be attended to somewhere.
        segregation: Weight of `Segregation` of the objects, >= 0: each is to be attended to where the others are not.
        binding: Weight of `Binding` of modifiers and nouns, >= 0: a colour is to be attended to where its noun is.
        strength: Of each change of the latents, as in `Correction`.
        normalize: As in `Correction`.
        sharpness: As in `Presence`.
        until: The share of the steps in which the latents are corrected, from the second one on, in (0, 1].
        corrections: The most corrections of a picture, spread evenly over these steps. None: one after each of them.
        targets: {share of the steps: score}, kept as a tuple of pairs: before the step at this share the change is
            repeated until the score reaches the number, at most `repeats` times.
        repeats: As in `Correction`.
        layers: The captured layers whose maps the scores see, as names or fnmatch patterns; a correction's forward and
            backward pass go no further than the last of them. None: all. Captured are the key layers, unless
            `apply(capture=...)` says otherwise.
        program: What happens to the rows of the map, as in `apply`.
        objects: The objects, as prompts write them; a prompt need not have all. None: the noun phrases that
            `find_phrases` finds, without those that name the picture itself, such as "photo", "style" and "background".

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or all weights are 0.

    Examples:
        >>> from dataclasses import replace
        >>> stronger = replace(Recipe.named("objects"), strength=0.2)
        >>> with sdattn_fast.apply(pipe, recipe=stronger):
        ...     image = pipe("a cat and a frog").images[0]
        >>> attend_and_excite = Recipe(
        ...     presence=1.0, sharpness=100.0, targets={0.2: 0.5, 0.4: 0.8}, strength=20.0, normalize=False, until=0.5,
        ...     corrections=None,
        ... )

    Source: Attend-and-Excite, Chefer et al. 2023, arXiv 2301.13826; A-STAR, Agarwal et al. 2023, arXiv 2306.14544;
    SynGen, Rassin et al. 2023, arXiv 2306.08877.
    """

    presence: float = 0.0
    segregation: float = 0.0
    binding: float = 0.0
    strength: float = 0.04
    normalize: bool = True
    sharpness: float | None = None
    until: float = 0.35
    corrections: int | None = 6
    targets: Mapping[float, float] | tuple[tuple[float, float], ...] = ()
    repeats: int = 20
    layers: str | tuple[str, ...] | None = None
    program: Program = field(default_factory=Program)
    objects: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("presence", "segregation", "binding", "strength", "until"):
            object.__setattr__(self, name, finite_number(f"Recipe.{name}", getattr(self, name)))
        for name in ("presence", "segregation", "binding", "strength"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"Recipe.{name}: expected a number >= 0, got {getattr(self, name)}")
        if not self.presence and not self.segregation and not self.binding:
            raise ValueError("Recipe: expected presence, segregation or binding greater than 0, got 0 for all")
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"Recipe.until: expected a share in (0, 1], got {self.until}")
        object.__setattr__(self, "targets", _checked_targets(self.targets, self.until))
        for name in ("corrections", "repeats"):
            count = getattr(self, name)
            if name == "corrections" and count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"Recipe.{name}: expected an int, got {type(count).__name__}")
            if count < 1:
                raise ValueError(f"Recipe.{name}: expected at least 1, got {count}")
        if not isinstance(self.normalize, bool):
            raise TypeError(f"Recipe.normalize: expected a bool, got {type(self.normalize).__name__}")
        if self.sharpness is not None and finite_number("Recipe.sharpness", self.sharpness) <= 0.0:
            raise ValueError(f"Recipe.sharpness: expected a number > 0 or None, got {self.sharpness}")
        object.__setattr__(self, "layers", layer_patterns("Recipe.layers", self.layers))
        if not isinstance(self.program, Program):
            raise TypeError(f"Recipe.program: expected a sdattn_fast.Program, got {type(self.program).__name__}")
        if self.objects is not None:
            if isinstance(self.objects, str) or not isinstance(self.objects, Sequence):
                raise TypeError(f"Recipe.objects: expected a sequence of str or None, got {self.objects!r}")
            if not self.objects or any(not isinstance(one, str) or not one.strip() for one in self.objects):
                raise ValueError(f"Recipe.objects: expected words of the prompt, got {self.objects!r}")
            object.__setattr__(self, "objects", tuple(self.objects))

    @classmethod
    def named(cls, name: str) -> Recipe:
        """The recipe that `sdattn_fast.apply` knows by a name.

        Args:
            name: "objects", "binding", "both" or "fast".

        Returns:
            The recipe.

        Raises:
            TypeError: If `name` is not a str.
            ValueError: If there is no such recipe.
        """
        if not isinstance(name, str):
            raise TypeError(f"recipe: expected a name or a sdattn_fast.guidance.Recipe, got {type(name).__name__}")
        if name not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(map(repr, RECIPES))} or a Recipe, got {name!r}")
        return RECIPES[name]


def _checked_targets(targets: Any, until: float) -> tuple[tuple[float, float], ...]:
    pairs = targets.items() if isinstance(targets, Mapping) else targets
    if not isinstance(pairs, (tuple, ItemsView)) or any(not isinstance(p, tuple) or len(p) != 2 for p in pairs):
        raise TypeError(f"Recipe.targets: expected {{share: score}}, got {targets!r}")
    checked = tuple(
        sorted(
            (finite_number("Recipe.targets", share), finite_number("Recipe.targets", score)) for share, score in pairs
        )
    )
    if len(dict(checked)) != len(checked):
        raise ValueError(f"Recipe.targets: expected each share once, got {targets!r}")
    for share, _ in checked:
        if not 0.0 <= share < until:
            raise ValueError(f"Recipe.targets: expected shares >= 0 and less than until, {until}, got {share}")
    return checked


# Chosen by `python -m sdattn_fast.studies.recipes` on the objects world (docs/objects.md).
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "objects": Recipe(presence=1.0, segregation=1.0),
        "binding": Recipe(binding=1.0, strength=0.08),
        "both": Recipe(presence=1.0, segregation=1.0, binding=0.1),
        "fast": Recipe(presence=1.0, segregation=1.0, strength=0.035, until=0.3, corrections=5, layers="down_blocks.*"),
    }
)
