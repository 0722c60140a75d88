"""What a UNet was asked in a step of a call, and what it said: for guidance that looks at it between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..streams import take_entries
from .text_rows import Rows

__all__ = ["Forward", "entries_of", "of_entries"]


@dataclass(frozen=True)
class Forward:
    """One forward of the UNet.

    inputs: by name. prediction: (B, C, height, width). rows: of its text; None where they are not known. guidance: what
    the pipeline's attributes of guidance were.
    """

    inputs: Mapping[str, Any]
    prediction: Tensor
    rows: Rows | None
    guidance: Mapping[str, Any]

    @property
    def prompts(self) -> list[int]:
        """The entries that are prompts, each picture once."""
        if self.rows is None:
            return []
        return [i for i in self.rows.active if not (self.rows.repeated and self.rows.repeated[i])]

    @property
    def unconditional(self) -> list[int]:
        return [] if self.rows is None else [i for i, p in enumerate(self.rows.prompt) if p < 0]

    @property
    def perturbed(self) -> list[int]:
        """The entries that ask a picture again, with perturbed attention."""
        return [] if self.rows is None else [i for i, again in enumerate(self.rows.repeated) if again]


def of_entries(bias: Tensor, rows: Rows | None) -> Tensor | None:
    """A bias (A, 1, M, N) of the pictures, or (1 or B, 1, M, N), for a text of these rows: zeros for unconditional
    entries; None where there are only such."""
    if rows is None:
        return bias
    entries = rows.active
    if not entries or len(entries) == len(rows.prompt) == len(bias):
        return bias if entries else None
    if len(bias) not in (1, rows.count):
        return bias
    whole = bias.new_zeros(len(rows.prompt), *bias.shape[1:])
    for i, entry in enumerate(entries):
        whole[entry] = bias[i % len(bias)]
    return whole


def entries_of(x: Any, batch: int, entries: Sequence[int]) -> Any:
    """The entries of whatever has a batch dimension, inside lists and dicts too."""
    if isinstance(x, Tensor):
        return x if x.dim() == 0 or x.shape[0] != batch else take_entries(x, entries)
    if isinstance(x, Mapping):
        return {key: entries_of(value, batch, entries) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(entries_of(value, batch, entries) for value in x)
    return x
