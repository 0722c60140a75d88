"""What a patch is asked to do, checked once: the keywords that `apply` and `SemanticAttnProcessor` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_program, check_seed
from ..functional import prepare
from ..program import Capture, Program

__all__ = ["Heads", "Settings", "checked_heads"]

Heads = Sequence[int] | Tensor | Mapping[str, Sequence[int]] | None


@dataclass(frozen=True)
class Settings:
    """The part of a patch that does not change while it lives.

    fold: "auto" folds projections into the text where that is cheaper, "always" wherever the kernel can or raises.
    text_cache: False computes the token side, keys and values anew at every call.

    Raises: TypeError, ValueError, naming the argument, what came and what was expected.
    """

    program: Program
    inactive_heads: str = "plain"
    seed: int | None = None
    capture: Capture | None = None
    fold: str = "auto"
    text_cache: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_program(self.program, self.capture, tokens=2**31)
        check_seed(self.seed)
        if isinstance(self.seed, Tensor):
            raise TypeError("seed: expected an int or None, got a Tensor (layer and timestep are mixed into an int)")
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


def checked_heads(heads: Any, count: int, where: str = "") -> tuple[int, ...] | None:
    """Indices of the active heads, sorted, or None for all; `where` goes into the messages (", in layer ...").

    Raises: TypeError (not ints), ValueError (out of range, twice).
    """
    if heads is None:
        return None
    if isinstance(heads, Tensor) and heads.dtype == torch.bool:
        if tuple(heads.shape) != (count,):
            raise ValueError(f"heads: expected a bool tensor of shape ({count},){where}, got {tuple(heads.shape)}")
        heads = heads.nonzero().flatten()
    if isinstance(heads, Tensor):
        heads = heads.tolist()
    if isinstance(heads, (str, bytes)) or not isinstance(heads, (Sequence, range)):
        raise TypeError(f"heads: expected indices, a mapping of layers to indices, or None, got {type(heads).__name__}")
    if any(isinstance(i, bool) or not isinstance(i, int) for i in heads):
        raise TypeError(f"heads: expected ints, got {list(heads)!r}")
    for i in heads:
        if not 0 <= i < count:
            raise ValueError(f"heads: expected indices in [0, {count}){where}, which has {count} heads, got {i}")
    if len(set(heads)) != len(heads):
        raise ValueError(f"heads: expected each index once, got {list(heads)!r}")
    return tuple(sorted(heads))
