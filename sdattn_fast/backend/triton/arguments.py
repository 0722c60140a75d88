"""What the kernels are handed beside tensors: orders and slots of tokens, strides, bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import check_rows
from ..limits import MAX_SIZE

__all__ = ["LOG2E", "bucket", "content_first", "in_units", "map_slots", "row_strides_of", "strides_of"]

LOG2E = math.log2(math.e)


def content_first(content: Tensor) -> Tensor:
    """(B, N) int32: each entry's tokens, the content ones first, else in their order. content is (B, N), 0 or 1."""
    return torch.argsort(content, dim=1, descending=True, stable=True).to(torch.int32)


def map_slots(tokens: Tensor, count: int) -> Tensor:
    """(count,) int32: where among the captured maps a token's is, -1 for tokens that are not captured."""
    slots = torch.full((count,), -1, dtype=torch.int32, device=tokens.device)
    slots[tokens.long()] = torch.arange(tokens.shape[0], dtype=torch.int32, device=tokens.device)
    return slots


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """The first three strides of x (B, H, M, D), 0 for a dimension of size 1, whose stride says nothing and may be
    anything: an odd one would keep the compiler from wide loads."""
    b, h, m = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return b, h, m


def row_strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """`strides_of` of each. Raises: ValueError where a last dimension, whose stride kernels do not take, is not
    contiguous."""
    check_rows(*tensors)
    return tuple(stride for x in tensors for stride in strides_of(x))


def in_units(*strides: int) -> tuple[int, tuple[int, ...]]:
    """(unit, strides / unit): the largest of 8, 4, 2 and 1 that divides them all.

    The kernels multiply the two again, in 32 bits where the stride in units fits, so a stride beyond that is passed as
    it is, which makes it a 64-bit argument.
    """
    if any(s >= 2**31 for s in strides):
        return 1, strides
    unit = next(u for u in (8, 4, 2, 1) if all(s % u == 0 for s in strides))
    return unit, tuple(s // unit for s in strides)


def bucket(most: int) -> int:
    """The bound on k that the kernel is compiled for: 0, 1, 2, 4, 8, or 256 for any k."""
    return next(bound for bound in (0, 1, 2, 4, 8, MAX_SIZE) if most <= bound)
