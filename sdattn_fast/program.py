"""The program: what happens to a row of cross-attention between its two products.

Four frozen dataclasses, hashable, printable, cheap to compare. They hold intent alone; token classes, gates and heads
belong to a call. Source: docs/design.md, "The row program".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Program", "SalienceDropout", "Refinement", "Capture", "finite_number", "layer_patterns"]

# Far beyond any use; a larger sigma asks for gigabytes of Gaussian, and more rounds for hours.
_MOST_SIGMA, _MOST_ROUNDS = 1000.0, 1000


@dataclass(frozen=True)
class SalienceDropout:
    """Salience dropout: drops the largest entries, so that attention spreads to other tokens or pixels.

    Only content tokens, the prompt's words, are ranked and dropped. On our test models the defaults with
    ``renormalize="content"`` lost 0.06 and 0.48 of the objects asked for, and mode "random" at a ratio of 0.05 made no
    difference (docs/evaluation.md).

    Args:
        ratio: Share of the entries to drop, in [0, 1]: ``k = floor(ratio * n + 1e-9)`` of n entries. n is the number of
            content tokens for axis "token", and of pixels for axis "space".
        axis: "token" ranks the tokens of each pixel, "space" the pixels of each token.
        mode: "topk" drops every entry that is at least as large as the k-th largest, so equal entries are dropped
            together. "random" drops an entry with probability `ratio`, by Philox4x32-10 with the seed of the call.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> program = Program(dropout=SalienceDropout(0.1))

    Source: PnP-OVSS, Luo et al. 2024, arXiv 2311.17095; docs/design.md, "Step 4: salience dropout".
    """

    ratio: float = 0.2
    axis: str = "token"
    mode: str = "topk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", finite_number("SalienceDropout.ratio", self.ratio))
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"SalienceDropout.ratio: expected a number in [0, 1], got {self.ratio!r}")
        _choice("SalienceDropout.axis", self.axis, ("token", "space"))
        _choice("SalienceDropout.mode", self.mode, ("topk", "random"))


@dataclass(frozen=True)
class Refinement:
    """Non-maximum suppression, the program's renormalization, and Gaussian smoothing, in one or more rounds.

    With ``renormalize="content"`` one round changed nothing about the objects drawn on one of our test models, and on
    axis "space" it lost 0.030 of them on the other; on axis "token" the maps of words got worse (docs/evaluation.md).

    Args:
        steps: Number of rounds, 1 to 1000. Each round works on the smoothed map of the one before. More rounds lost
            objects on our small test model (docs/structure.md).
        threshold: A content entry p is kept where ``p > threshold * maximum``, in [0, 1). None: no suppression.
        sigma: Standard deviation of the Gaussian, in pixels of the layer's grid, 0 to 1000. 0: no smoothing.
        axis: "token" takes the maximum over the content tokens of each pixel, "space" over the pixels of each token.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> program = Program(refine=Refinement(threshold=0.1, sigma=1.0), renormalize="content")

    Source: docs/design.md, "Step 5: suppression", "Step 6: renormalization" and "Step 7: smoothing".
    """

    steps: int = 1
    threshold: float | None = 0.7
    sigma: float = 0.8
    axis: str = "token"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"Refinement.steps: expected an int, got {_said(self.steps)}")
        if not 1 <= self.steps <= _MOST_ROUNDS:
            raise ValueError(f"Refinement.steps: expected 1 to {_MOST_ROUNDS}, got {self.steps!r:.40}")
        if self.threshold is not None:
            object.__setattr__(self, "threshold", finite_number("Refinement.threshold", self.threshold))
            if not 0.0 <= self.threshold < 1.0:
                raise ValueError(f"Refinement.threshold: expected None or a number in [0, 1), got {self.threshold!r}")
        object.__setattr__(self, "sigma", finite_number("Refinement.sigma", self.sigma))
        if not 0.0 <= self.sigma <= _MOST_SIGMA:
            raise ValueError(f"Refinement.sigma: expected a number in [0, {_MOST_SIGMA:g}], got {self.sigma!r}")
        _choice("Refinement.axis", self.axis, ("token", "space"))


@dataclass(frozen=True)
class Program:
    """What happens to each row of the attention map between softmax and the product with the values.

    A row holds one pixel's probabilities over the tokens. The steps run in this order: gate and phrases, which are
    inputs of the call, then `dropout`, then the rounds of `refine`. ``Program()`` is plain attention, and on our test
    models no program with default settings drew better pictures (docs/evaluation.md). Programs are immutable and
    hashable.

    Args:
        dropout: Salience dropout. None: no dropout.
        refine: Suppression and smoothing. None: neither.
        renormalize: "none": nothing is scaled. "content": the content entries of a row are multiplied by one factor,
            which restores the sum that they had before the gate. "row": the row is divided by its sum.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `renormalize` is another string.

    Examples:
        >>> program = Program(SalienceDropout(0.1), Refinement(threshold=0.1), renormalize="content")
        >>> with sdattn_fast.apply(pipe, program):
        ...     image = pipe("a red car").images[0]

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
    """Which attention maps a patch keeps, or `semantic_attention` returns.

    Args:
        tokens: Indices of the tokens whose maps are wanted, in this order. None: all tokens.
        stage: "softmax": the map before the program. "final": the map after the whole program.
        reduce: "mean": the mean over the active heads, zeros where no head is active. "none": each head's map.
        layers: Names or fnmatch patterns of a patch's layers. None: the key layers, whose resolution is nearest to a
            quarter of the latent's side, but at least 16 pixels (16x16 in SD 1.5, 32x32 in SDXL).
        steps: Indices of the denoising steps over which a patch takes the mean. None: all. "latest": the latest step
            only.

    `semantic_attention`, which is one layer at one step, ignores `layers` and `steps`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an index is negative or occurs twice, or a string is not one of those named.

    Examples:
        >>> capture = Capture(tokens=(2, 3), layers="up_blocks.*", steps=(0, 1, 2, 3))
        >>> with sdattn_fast.apply(pipe, capture=capture) as patch:
        ...     image = pipe("a red car").images[0]
        ...     maps = patch.maps.upsample()  # (1, 2, height, width) of the latent
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
        object.__setattr__(self, "layers", layer_patterns("Capture.layers", self.layers))
        _choice("Capture.stage", self.stage, ("softmax", "final"))
        _choice("Capture.reduce", self.reduce, ("mean", "none"))


def layer_patterns(name: str, given: Any) -> str | tuple[str, ...] | None:
    """Names or patterns of layers as a frozen dataclass keeps them. Raises: TypeError where they are none."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Sequence) or any(not isinstance(one, str) for one in given):
        raise TypeError(f"{name}: expected None, names or patterns, got {_said(given)}")
    return tuple(given)


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


def finite_number(name: str, value: Any) -> float:
    """The number as a float. Raises: TypeError; ValueError for what is not finite or beyond a float's range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {_said(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number!r}")
    return number


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {choices}, got {_said(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def _said(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
