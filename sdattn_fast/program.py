"""The program: what happens to a row of cross-attention between its two products.

Four frozen dataclasses, hashable, printable, cheap to compare. They hold intent alone; token classes, gates and heads
belong to a call. Source: docs/design.md, "The row program".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Program", "SalienceDropout", "Refinement", "Capture"]


@dataclass(frozen=True)
class SalienceDropout:
    """Drop the most salient content entries of every row (or of every token's map).

    Args:
        ratio: share of the entries to drop, in [0, 1]; ``k = floor(ratio * n + 1e-9)``. ``n`` counts the content tokens
            (axis "token") or the pixels (axis "space").
        axis: "token", over the tokens of one pixel, or "space", over the pixels of one token's map.
        mode: "topk" drops every entry at least as large as the k-th largest, so ties go together; "random" drops an
            entry where ``u < ratio``, ``u`` from Philox4x32-10 with the call's seed.

    The defaults are as published. With them and ``renormalize="content"`` the shapes pipeline lost objects; mode
    "random" made no difference (docs/evaluation.md).

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.

    Source: the salience dropout of PnP-OVSS; docs/design.md, "Step 4: salience dropout".
    """

    ratio: float = 0.2
    axis: str = "token"
    mode: str = "topk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", _number("SalienceDropout.ratio", self.ratio))
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"SalienceDropout.ratio: expected a number in [0, 1], got {self.ratio!r}")
        _choice("SalienceDropout.axis", self.axis, ("token", "space"))
        _choice("SalienceDropout.mode", self.mode, ("topk", "random"))


@dataclass(frozen=True)
class Refinement:
    """Non-maximum suppression, renormalisation and Gaussian smoothing, repeated.

    Args:
        steps: rounds R >= 1; rounds 2..R work on the map that the round before smoothed. More than 1 lost objects on
            the shapes pipeline (docs/structure.md).
        threshold: content entries survive where ``p > threshold * max``, in [0, 1); None: no suppression.
        sigma: standard deviation of the Gaussian, in pixels of the layer's grid, >= 0; 0: no smoothing.
        axis: the maximum is taken over the row's content ("token") or over the token's map ("space").

    The defaults, with ``renormalize="content"``, made no difference to the objects of the shapes pipeline, on either
    axis; over tokens the maps of words got worse (docs/evaluation.md).

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.

    Source: docs/design.md, "Step 5: suppression", "Step 6: renormalise" and "Step 7: smoothing".
    """

    steps: int = 1
    threshold: float | None = 0.7
    sigma: float = 0.8
    axis: str = "token"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"Refinement.steps: expected an int, got {_said(self.steps)}")
        if self.steps < 1:
            raise ValueError(f"Refinement.steps: expected at least 1, got {self.steps}")
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _number("Refinement.threshold", self.threshold))
            if not 0.0 <= self.threshold < 1.0:
                raise ValueError(f"Refinement.threshold: expected None or a number in [0, 1), got {self.threshold!r}")
        object.__setattr__(self, "sigma", _number("Refinement.sigma", self.sigma))
        if self.sigma < 0.0:
            raise ValueError(f"Refinement.sigma: expected a finite number >= 0, got {self.sigma!r}")
        _choice("Refinement.axis", self.axis, ("token", "space"))


@dataclass(frozen=True)
class Program:
    """What to do to every row. ``Program()`` is plain attention, and no program alone drew better pictures than it on
    the shapes pipeline (docs/evaluation.md).

    Args:
        dropout: a `SalienceDropout`, or None.
        refine: a `Refinement`, or None.
        renormalize: "none"; "content": the content entries regain, by one factor, the mass they had before the gate;
            "row": the row sums to 1.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.

    Source: docs/design.md, "The row program".
    """

    dropout: SalienceDropout | None = None
    refine: Refinement | None = None
    renormalize: str = "none"

    def __post_init__(self) -> None:
        if not (self.dropout is None or isinstance(self.dropout, SalienceDropout)):
            raise TypeError(f"Program.dropout: expected a SalienceDropout or None, got {_said(self.dropout)}")
        if not (self.refine is None or isinstance(self.refine, Refinement)):
            raise TypeError(f"Program.refine: expected a Refinement or None, got {_said(self.refine)}")
        _choice("Program.renormalize", self.renormalize, ("none", "content", "row"))


@dataclass(frozen=True)
class Capture:
    """Which parts of the attention map to keep.

    Args:
        tokens: indices of the tokens whose maps are wanted, in that order; None: all of them.
        stage: "softmax", after step 1, or "final", after the whole program.
        reduce: over heads, "mean" (of the active heads; zeros where there is none) or "none" (every head by itself).
        layers: of a patch: names or fnmatch patterns; None: its key layers, the level nearest to a quarter of the
            latent's side, but not below 16 pixels (16x16 for SD 1.5, 32x32 for SDXL).
        steps: of a patch: indices of the denoising steps whose mean is kept; None: all; "latest": the latest alone.

    `semantic_attention`, which is one layer at one step, has no use for layers and steps.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    tokens: tuple[int, ...] | None = None
    stage: str = "final"
    reduce: str = "mean"
    layers: str | tuple[str, ...] | None = None
    steps: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _indices("Capture.tokens", self.tokens))
        if self.steps is not None and self.steps != "latest":
            object.__setattr__(self, "steps", _indices("Capture.steps", self.steps, "'latest', "))
        if self.layers is not None and not isinstance(self.layers, str):
            if not isinstance(self.layers, Sequence) or any(not isinstance(name, str) for name in self.layers):
                raise TypeError(f"Capture.layers: expected None, names or patterns, got {_said(self.layers)}")
            object.__setattr__(self, "layers", tuple(self.layers))
        _choice("Capture.stage", self.stage, ("softmax", "final"))
        _choice("Capture.reduce", self.reduce, ("mean", "none"))


def _indices(name: str, given: Any, or_else: str = "") -> tuple[int, ...]:
    if isinstance(given, str):
        raise TypeError(f"{name}: expected {or_else}None or a sequence of ints, got {_said(given)}")
    try:
        indices = tuple(given)
    except TypeError:
        raise TypeError(f"{name}: expected {or_else}None or a sequence of ints, got {_said(given)}") from None
    if any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise TypeError(f"{name}: expected ints, got {indices!r}")
    if any(i < 0 for i in indices):
        raise ValueError(f"{name}: expected indices >= 0, got {indices!r}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{name}: expected each index once, got {indices!r}")
    return indices


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {_said(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {choices}, got {_said(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def _said(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
