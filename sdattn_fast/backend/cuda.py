"""The C++/CUDA backend: not written yet. It says so, here and in `sdattn_fast.backends()`."""

from __future__ import annotations

from torch import Tensor

from ..plan import Plan, RowPlan

_WHY = "the C++/CUDA backend is not part of this version; use 'triton' on a GPU"


def availability() -> str | None:
    """Always the reason why not."""
    return _WHY


def not_supported_reasons(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, plan: Plan, needs_grad: bool
) -> list[str]:
    """Always the one reason."""
    return [_WHY]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    return_bits: bool = False,
    keep_layout: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Raises ValueError."""
    raise ValueError(f"backend: {_WHY}")


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None) -> Tensor:
    """Raises ValueError."""
    raise ValueError(f"backend: {_WHY}")
