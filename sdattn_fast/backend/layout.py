"""The memory layouts that kernels expect, checked where a tensor's address is handed to one.

A kernel reads by address and strides, so a layout that it does not expect gives wrong numbers and no error. A tensor is
handed on in one of three ways: with all its strides; with strides and a contiguous last dimension ("rows"), which is
what the products want; or by its address alone, and then it is contiguous as a whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..plan import RowPlan

__all__ = [
    "address", "check_contiguous", "check_rows", "has_rows", "row_program", "row_strided", "strided", "with_rows",
]  # fmt: skip


def has_rows(x: Tensor) -> bool:
    """Whether the last dimension is contiguous. The stride of a dimension of size 1 says nothing."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def with_rows(x: Tensor) -> Tensor:
    """x, copied where its last dimension is not contiguous."""
    return x if has_rows(x) else x.contiguous()


def strided(x: Tensor | None) -> tuple[int, ...]:
    """(address, *strides) of a tensor of four dimensions, zeros for None."""
    return (0, 0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride())


def row_strided(x: Tensor | None) -> tuple[int, ...]:
    """As `strided`. Raises: ValueError where the last dimension is not contiguous."""
    check_rows(x)
    return strided(x)


def address(x: Tensor | None) -> int:
    """0 for None. Raises: ValueError where the tensor is not contiguous."""
    if x is None:
        return 0
    if not x.is_contiguous():  # asked here: a kernel takes a dozen addresses a call
        check_contiguous(x)
    return x.data_ptr()


def row_program(rows: RowPlan, content: Tensor | None) -> tuple[Any, ...]:
    """A plan as compiled code takes it, in the order of `csrc/row_program.h`. content: the plan's, or None where it is
    to be plain attention."""
    return (
        address(content),
        address(rows.gate),
        1 if rows.gate is None else rows.gate.shape[1],
        address(rows.phrases),
        address(rows.drop),
        rows.random_ratio,
        address(rows.seed),
        rows.threshold,
        rows.renormalize,
        address(rows.head_mode),
        address(rows.capture_tokens),
        0 if rows.capture_tokens is None else rows.capture_tokens.shape[0],
        rows.capture_final,
        rows.capture_mean,
    )


def check_rows(*tensors: Tensor | None) -> None:
    """Raises: ValueError where a last dimension is not contiguous."""
    for x in tensors:
        if x is not None and not has_rows(x):
            raise ValueError(f"kernel: expected a contiguous last dimension, got {_described(x)}")


def check_contiguous(*tensors: Tensor | None) -> None:
    """Raises: ValueError where a tensor is not contiguous."""
    for x in tensors:
        if x is not None and not x.is_contiguous():
            raise ValueError(f"kernel: expected a contiguous tensor, got {_described(x)}")


def _described(x: Tensor) -> str:
    return f"shape {tuple(x.shape)} with strides {x.stride()}"
