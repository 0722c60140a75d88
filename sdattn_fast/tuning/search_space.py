"""What reward tuning searches: programs, layers, heads, guidance and steps."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..files import ProgramFile, read_json
from ..patching.layers import select_layers
from ..program import Program, Refinement, SalienceDropout
from .head_ranking import HeadRanking

__all__ = ["SearchSpace"]


@dataclass(frozen=True)
class SearchSpace:
    """What `tune` searches. Pairs are (lowest, highest), both included; tuples of strings are choices.

    Args:
        guidance_scale: Range of the guidance scale. None: not searched.
        num_inference_steps: Range of the number of steps. None: not searched.
        dropout_ratio: Range of `SalienceDropout.ratio`; trials without dropout are searched too. None: no dropout.
        dropout_axis: Choices of `SalienceDropout.axis`.
        threshold: Range of `Refinement.threshold`; trials without refinement are searched too. None: no suppression.
        sigma: Range of `Refinement.sigma`. None: no smoothing. With `threshold` None too: no refinement.
        refine_steps: Range of `Refinement.steps`.
        refine_axis: Choices of `Refinement.axis`.
        renormalize: Choices of `Program.renormalize`.
        layers: Choices of patterns for `apply`; those that match no layer of the model are ignored.
        heads: Range of the share of best heads that stay active. None, or without a ranking: all heads.
        inactive_heads: Choices for the other heads.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> space = SearchSpace(dropout_ratio=None, sigma=(0.0, 1.0), num_inference_steps=(20, 50))
        >>> file = space.suggest(study.ask(), reward.model_layers, None)  # the program of a new trial
        >>> space.stock({"guidance_scale": 7.5}, reward.model_layers, None)
        {'renormalize': 'none', 'layers': '*', 'refine': False, 'guidance_scale': 7.5}
    """

    guidance_scale: tuple[float, float] | None = (1.0, 10.0)
    num_inference_steps: tuple[int, int] | None = None
    dropout_ratio: tuple[float, float] | None = (0.05, 0.6)
    dropout_axis: tuple[str, ...] = ("token", "space")
    threshold: tuple[float, float] | None = (0.0, 0.9)
    sigma: tuple[float, float] | None = (0.0, 2.0)
    refine_steps: tuple[int, int] = (1, 4)
    refine_axis: tuple[str, ...] = ("token", "space")
    renormalize: tuple[str, ...] = ("none", "content", "row")
    layers: tuple[str, ...] = ("*", "down_blocks.*", "mid_block.*", "up_blocks.*")
    heads: tuple[float, float] | None = (0.1, 1.0)
    inactive_heads: tuple[str, ...] = ("plain", "zero")

    def __post_init__(self) -> None:
        limits = {
            "guidance_scale": (0.0, 100.0), "num_inference_steps": (1, 1000), "dropout_ratio": (0.0, 1.0),
            "threshold": (0.0, 0.999), "sigma": (0.0, 64.0), "refine_steps": (1, 16), "heads": (0.0, 1.0),
        }  # fmt: skip
        known = {
            "dropout_axis": ("token", "space"), "refine_axis": ("token", "space"), "inactive_heads": ("plain", "zero"),
            "renormalize": ("none", "content", "row"), "layers": None,
        }  # fmt: skip
        for name, (low, high) in limits.items():
            whole = name in ("num_inference_steps", "refine_steps")
            may_be_none = name != "refine_steps"
            object.__setattr__(self, name, _range(name, getattr(self, name), low, high, whole, may_be_none))
        for name, choices in known.items():
            object.__setattr__(self, name, _choices(name, getattr(self, name), choices))

    @classmethod
    def load(cls, path: str | Path) -> SearchSpace:
        """Read a JSON file such as ``{"format": "sdattn-fast space", "version": 1, "sigma": [0, 1]}``.

        Args:
            path: Its path. Fields that it does not name have their defaults.

        Returns:
            The search space.

        Raises:
            TypeError: If a field has the wrong type.
            ValueError: If it is not such a file, or a field is unknown or out of range.
            OSError: If it cannot be read.
        """
        content = read_json(path, "sdattn-fast space")
        unknown = set(content) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{path}: expected the fields of a search space, got also {min(unknown)!r}")
        try:
            return cls(**content)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    def suggest(self, trial: Any, model_layers: Sequence[str], ranking: HeadRanking | None) -> ProgramFile:
        """The program that an Optuna trial runs.

        Args:
            trial: The trial.
            model_layers: Names of the model's cross-attention layers.
            ranking: Ranking of the model's heads. None: all heads stay active.

        Returns:
            The program with its settings.
        """
        dropout = refine = None
        if self.dropout_ratio is not None and trial.suggest_categorical("dropout", (False, True)):
            axis = trial.suggest_categorical("dropout_axis", self.dropout_axis)
            dropout = SalienceDropout(trial.suggest_float("dropout_ratio", *self.dropout_ratio), axis)
        refinable = self.threshold is not None or self.sigma is not None
        if refinable and trial.suggest_categorical("refine", (False, True)):
            refine = Refinement(
                trial.suggest_int("refine_steps", *self.refine_steps),
                None if self.threshold is None else trial.suggest_float("threshold", *self.threshold),
                0.0 if self.sigma is None else trial.suggest_float("sigma", *self.sigma),
                trial.suggest_categorical("refine_axis", self.refine_axis),
            )
        program = Program(dropout, refine, trial.suggest_categorical("renormalize", self.renormalize))
        patterns = _matching(self.layers, model_layers)
        layers = trial.suggest_categorical("layers", patterns)
        scale = steps = heads = None
        inactive = "plain"
        if self.guidance_scale is not None:
            scale = trial.suggest_float("guidance_scale", *self.guidance_scale)
        if self.num_inference_steps is not None:
            steps = trial.suggest_int("num_inference_steps", *self.num_inference_steps)
        if ranking is not None and self.heads is not None:
            share = trial.suggest_float("heads", *self.heads)
            count = max(1, round(share * len(ranking.scores)))
            inactive = trial.suggest_categorical("inactive_heads", self.inactive_heads)
            if count < len(ranking.scores):
                here = set(select_layers(layers, model_layers))
                heads = {layer: indices for layer, indices in ranking.best(count).items() if layer in here}
        return ProgramFile(
            program, None if layers == "*" else (layers,), heads, inactive if heads else "plain", scale, steps
        )

    def stock(
        self, asked: Mapping[str, Any], model_layers: Sequence[str], ranking: HeadRanking | None
    ) -> dict[str, Any]:
        """The parameters of the trial that is stock attention, or as near to it as the ranges allow.

        Args:
            asked: What the pipeline is called with, such as ``guidance_scale``.
            model_layers: Names of the model's cross-attention layers.
            ranking: Ranking of the model's heads. None: all heads stay active.

        Returns:
            Names of parameters and their values.
        """
        parameters: dict[str, Any] = {
            "renormalize": self.renormalize[0],
            "layers": _matching(self.layers, model_layers)[0],
        }
        if self.dropout_ratio is not None:
            parameters["dropout"] = False
        if self.threshold is not None or self.sigma is not None:
            parameters["refine"] = False
        for name in ("guidance_scale", "num_inference_steps"):
            limits = getattr(self, name)
            if limits is not None and name in asked:
                parameters[name] = min(max(asked[name], limits[0]), limits[1])
        if ranking is not None and self.heads is not None:
            parameters |= {"heads": self.heads[1], "inactive_heads": self.inactive_heads[0]}
        return parameters


def _matching(patterns: Sequence[str], layers: Sequence[str]) -> list[str]:
    matching = [p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in layers)]
    if not matching:
        raise ValueError(f"layers: none of {', '.join(map(repr, patterns))} matches a layer of the model")
    return matching


def _range(name: str, value: Any, low: float, high: float, whole: bool, may_be_none: bool) -> Any:
    expected = f"{'two ints' if whole else 'two numbers'}, lowest and highest, from {low} to {high}"
    if value is None and may_be_none:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    kinds = (int,) if whole else (int, float)
    if any(isinstance(x, bool) or not isinstance(x, kinds) for x in value):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return tuple(value) if whole else (float(value[0]), float(value[1]))


def _choices(name: str, choices: Any, known: tuple[str, ...] | None) -> tuple[str, ...]:
    expected = "patterns of layers" if known is None else f"some of {', '.join(known)}"
    if isinstance(choices, str) or not isinstance(choices, Sequence) or any(not isinstance(x, str) for x in choices):
        raise TypeError(f"{name}: expected {expected}, got {choices!r}")
    if not choices or len(set(choices)) != len(choices) or (known is not None and not set(choices) <= set(known)):
        raise ValueError(f"{name}: expected {expected}, each once, got {list(choices)!r}")
    return tuple(choices)
