"""What a patch is asked to do, checked once: the keywords that `apply` and `SemanticAttnProcessor` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_program
from ..functional import prepare
from ..program import Capture, Program, SalienceDropout

__all__ = ["Heads", "Settings"]

Heads = Sequence[int] | Tensor | Mapping[str, Sequence[int]] | None
DropoutSchedule = tuple[tuple[int, float], ...]
DropoutWhen = str | Mapping[int, float] | DropoutSchedule


@dataclass(frozen=True)
class Settings:
    """The part of a patch that does not change while it lives.

    fold: "auto" folds projections into the text where that is cheaper, "always" wherever the kernel can or raises.
    text_cache: False computes the token side, keys and values anew at every call. dropout_when: "always", "training"
    (while the layer is in train mode), or {step: ratio}.

    Raises: TypeError, ValueError, naming the argument, what came and what was expected.
    """

    program: Program
    inactive_heads: str = "plain"
    capture: Capture | None = None
    fold: str = "auto"
    text_cache: bool = True
    backend: str = "auto"
    dropout_when: DropoutWhen = "always"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dropout_when", _checked_when(self.dropout_when, self.program))
        check_program(self.program, self.capture, tokens=2**31)
        if not isinstance(self.fold, str):
            raise TypeError(f"fold: expected 'auto', 'never' or 'always', got {type(self.fold).__name__}")
        if self.fold not in ("auto", "never", "always"):
            raise ValueError(f"fold: expected 'auto', 'never' or 'always', got {self.fold!r}")
        if not isinstance(self.text_cache, bool):
            raise TypeError(f"text_cache: expected a bool, got {type(self.text_cache).__name__}")
        if self.fold == "always" and not self.text_cache:
            raise ValueError("fold: 'always' needs text_cache=True, since what is folded is kept with the text")
        # The smallest call there is checks the two arguments that are left as the op itself does.
        prepare(
            Program(), batch=1, heads_count=1, tokens=1, device=torch.device("cpu"),
            inactive_heads=self.inactive_heads, backend=self.backend,
        )  # fmt: skip

    @property
    def draws(self) -> bool:
        """Whether what is dropped is drawn at random."""
        return self.program.dropout is not None and self.program.dropout.mode == "random"

    def program_at(self, step: int | None, training: bool) -> Program:
        """The program, its salience dropout as `dropout_when` has it. step: of a schedule; needed there alone."""
        dropout, when = self.program.dropout, self.dropout_when
        if dropout is None or when == "always" or (when == "training" and training):
            return self.program
        if when == "training":
            return replace(self.program, dropout=None)
        assert isinstance(when, tuple)
        if step is None:
            raise ValueError("dropout_when: a schedule needs the step; set patch.step in the training loop")
        ratio = _scheduled(when, step)
        return replace(self.program, dropout=None if ratio == 0.0 else replace(dropout, ratio=ratio))


def _scheduled(schedule: DropoutSchedule, step: int) -> float:
    """Linear between the steps that are named, constant before the first and after the last."""
    following = next((i for i, (at, _) in enumerate(schedule) if at > step), len(schedule))
    if following in (0, len(schedule)):
        return schedule[min(following, len(schedule) - 1)][1]
    (start, low), (end, high) = schedule[following - 1 : following + 1]
    return low + (high - low) * (step - start) / (end - start)


def _checked_when(when: Any, program: Program) -> DropoutWhen:
    if isinstance(when, str):
        if when not in ("always", "training"):
            raise ValueError(f"dropout_when: expected 'always', 'training' or {{step: ratio}}, got {when!r}")
    elif isinstance(when, (Mapping, tuple)):
        points = tuple(sorted(when.items())) if isinstance(when, Mapping) else when
        if not points:
            raise ValueError("dropout_when: expected at least one step in a schedule, got none")
        for step, ratio in points:
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ValueError(f"dropout_when: expected steps that are ints >= 0, got {step!r}")
            SalienceDropout(ratio)  # checks it
        when = tuple((step, float(ratio)) for step, ratio in points)
    else:
        raise TypeError(f"dropout_when: expected a str or a mapping of steps to ratios, got {type(when).__name__}")
    if when != "always" and program.dropout is None:
        raise ValueError(f"dropout_when: {when!r} says when to drop, and the program has no dropout")
    return when
