"""Prepared calls whose numbers are exchanged where they lie: a CUDA graph reads the same memory at every replay.

`difference` says whether that can be, `rewrite` does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..execute import Prepared
from ..streams import to_device

__all__ = ["difference", "rewrite", "rewrite_tensors"]

_BOUNDS = {"max_content": "content tokens", "max_drop": "tokens to drop"}


def difference(held: Prepared, other: Prepared) -> str | None:
    """Why the numbers of another call, of the same program, cannot be written into a held one's, or None."""
    for name, mine, theirs in _side_by_side(held, other):
        if name in _BOUNDS:
            if theirs > mine:
                return f"up to {mine} {_BOUNDS[name]} were there, now there are up to {theirs}"
        elif isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                return f"{name} was {tuple(mine.shape)} {mine.dtype}, now it is {tuple(theirs.shape)} {theirs.dtype}"
        elif isinstance(mine, Tensor) or isinstance(theirs, Tensor):
            was_there = isinstance(mine, Tensor)
            return f"{name} was {'there, now it is not' if was_there else 'not there, now it is'}"
        elif mine != theirs:
            return f"{name} was {mine!r}, now it is {theirs!r}"
    return None


def rewrite(held: Prepared, other: Prepared) -> None:
    """Write another call's numbers into a held one's tensors, and into what backends derived from them.

    other: made for the same device or the CPU, and without a `difference`.
    """
    pairs = [(mine, theirs) for _, mine, theirs in _side_by_side(held, other) if isinstance(mine, Tensor)]
    rewrite_tensors([mine for mine, _ in pairs], [theirs for _, theirs in pairs])
    if held.plan is not None:
        held.plan.rows.derive_again()
    object.__setattr__(held, "at_home", other.home)  # frozen for everybody else


def rewrite_tensors(held: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes and dtypes."""
    # Allowed for both kinds of tensors there, and outside it for one.
    with torch.inference_mode():
        for mine, theirs in zip(held, others, strict=True):
            if mine.data_ptr() != theirs.data_ptr():
                mine.copy_(to_device(theirs, mine.device))


def _side_by_side(held: Prepared, other: Prepared) -> Iterator[tuple[str, Any, Any]]:
    """(name, mine, theirs) of all that the two are made of, down to tensors and numbers."""
    parts: list[tuple[Any, Any]] = [(held.side, other.side)]
    if held.plan is not None and other.plan is not None:
        parts += [(held.plan.rows, other.plan.rows), (held.plan.picture, other.plan.picture), (held.plan, other.plan)]
    for mine, theirs in parts:
        if mine is None or theirs is None:
            continue
        for field in fields(mine):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            if field.name not in ("derived", "device") and not is_dataclass(a):
                yield field.name, a, b
