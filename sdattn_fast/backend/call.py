"""`AttentionCall`: one call of attention as it goes from the checks to a backend; and what it has from its text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Plan, RowPlan, TokenSide, fold_into_value
from ..program import Capture, Program

__all__ = ["AttentionCall", "LoweredProgram", "Relevance"]


# Not frozen: that takes two microseconds a call.
@dataclass(slots=True)
class AttentionCall:
    """Checked, and never written to.

    query (B, H, M, D), key (B, H, N, D), value (B, H, N, Dv): of one floating dtype, on one device.
    bias: floating, broadcasts to (B, H, M, N), or None. scale: factor of the logits.
    grid: (height, width) of the M pixels, None where nothing is smoothed.
    seed: (B,) int64 on the query's device, None without random dropout.
    needs_grad: whether autograd is to differentiate the call.
    folded_value: `LoweredProgram.fold_value(value)`, where it was made before. relevance: fused backends only.
    """

    lowered: LoweredProgram
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scale: float
    grid: tuple[int, int] | None
    seed: Tensor | None
    needs_grad: bool
    folded_value: Tensor | None = None
    relevance: Relevance | None = None


@dataclass(frozen=True)
class LoweredProgram:
    """A program for one text, which many calls share. plan: None where the reference alone is to serve."""

    program: Program
    side: TokenSide
    plan: Plan | None
    capture: Capture | None

    def fold_value(self, value: Tensor) -> Tensor:
        """The values with the program's linear steps in them, where it has no others."""
        return fold_into_value(value, self.plan.side) if self.plan is not None and self.plan.folded else value

    def seeded_rows(self, seed: Tensor | None) -> RowPlan:
        """The plan's rows, with a call's seed in them."""
        assert self.plan is not None
        return self.plan.rows if seed is None else self.plan.rows.with_seed(seed)

    def needs_grad(self, *tensors: Tensor | None) -> bool:
        """Whether autograd is to differentiate a call with these tensors."""
        if not torch.is_grad_enabled():
            return False
        return any(x is not None and x.requires_grad for x in (*tensors, self.side.gate))


@dataclass(frozen=True)
class Relevance:
    """Asks the backward pass for sum over heads of A * relu(dL/dA), A the program's probabilities: GradCAM's relevance.

    sink: (B, T, M) float32 that requires grad; its values are not read, and its gradient is the relevance. tokens: (T,)
    int32. heads: (H,) uint8, the heads to sum over; None: all.
    """

    sink: Tensor
    tokens: Tensor
    heads: Tensor | None = None
