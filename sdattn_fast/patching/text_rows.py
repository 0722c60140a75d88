"""Which entry of a batch of text is which prompt's, and which tokens are content: what pipelines say of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Rows"]


@dataclass
class Rows:
    """What the pipeline knows of a batch of text.

    prompt: for every batch entry the index of its prompt, -1 for an unconditional entry. prompts: how many there are.
    protected: (B, N) bool on the CPU; None where the tokens of a prompt are unknown. repeated: which entries are of the
    same picture as an earlier one.
    """

    prompt: list[int]
    prompts: int
    protected: Tensor | None
    repeated: Sequence[bool] = ()

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for rows that are alike."""
        protected = self.protected
        return (
            tuple(self.prompt),
            tuple(self.repeated),
            None if protected is None else (*protected.shape, protected.numpy().tobytes()),
        )
