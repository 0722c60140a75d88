"""Step 7 after a kernel: the Gaussian smoothing of outputs and of maps, on the backend that served the rows."""

from __future__ import annotations

from torch import Tensor

from ..plan import Plan
from . import autograd, fused, op

__all__ = ["smoothed"]


def smoothed(
    name: str,
    out: Tensor,
    maps: Tensor | None,
    plan: Plan,
    grid: tuple[int, int] | None,
    needs_grad: bool = False,
    recorded: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out (B, H, M, Dv), or (B, M, Dv) summed over the heads, and final maps (B, H, T, M) or (B, T, M), as the plan
    smooths them. needs_grad, recorded: as in `dispatch.run_fused`."""
    if not plan.smoothings:
        return out, maps
    assert grid is not None
    out = _smooth(name, out, plan, grid, needs_grad, recorded)
    if maps is not None and plan.rows.capture_final:
        # A map is one more channel.
        channels = maps.transpose(-1, -2).contiguous()
        maps = _smooth(name, channels, plan, grid, needs_grad, recorded).transpose(-1, -2)
    return out, maps


def _smooth(name: str, x: Tensor, plan: Plan, grid: tuple[int, int], needs_grad: bool, recorded: bool) -> Tensor:
    where = plan.smoothed
    by_head = x.dim() == 4
    if not by_head:
        x = x[:, None]
        where = None if where is None or plan.side.active is None else plan.side.active[:, None]
    how = grid, plan.sigma, plan.smoothings, where
    if needs_grad:
        x = autograd.smooth(x, *how, name)
    elif recorded:
        x = op.smooth(x, *how, name)
    else:
        x = fused(name).smooth(x, *how)
    return x if by_head else x[:, 0]
