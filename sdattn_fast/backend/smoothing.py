"""The Gaussian smoothing of a plan, on the backend that served the rows: of outputs and of maps."""

from __future__ import annotations

from torch import Tensor

from ..graphs import in_graph
from ..plan import Plan
from . import autograd, fused, op

__all__ = ["smooth", "smooth_maps"]


def smooth(
    name: str, x: Tensor, grid: tuple[int, int], plan: Plan, where: Tensor | None, needs_grad: bool = False
) -> Tensor:
    """A backend's `smooth`, as the plan says: differentiable where gradients are needed, an op in a graph."""
    if needs_grad:
        return autograd.smooth(x, grid, plan.sigma, plan.smoothings, where, name)
    if in_graph():
        return op.smooth(x, grid, plan.sigma, plan.smoothings, where, name)
    return fused(name).smooth(x, grid, plan.sigma, plan.smoothings, where)


def smooth_maps(name: str, maps: Tensor, grid: tuple[int, int], plan: Plan, needs_grad: bool = False) -> Tensor:
    """(B, T, M) or (B, H, T, M), smoothed like the output: a map is one more channel."""
    where = plan.smoothed
    if maps.dim() == 3:
        if where is not None and plan.side.active is not None:
            where = plan.side.active[:, None]
        elif where is not None:
            where = None
        maps = maps[:, None].transpose(-1, -2).contiguous()
        return smooth(name, maps, grid, plan, where, needs_grad).transpose(-1, -2)[:, 0]
    return smooth(name, maps.transpose(-1, -2).contiguous(), grid, plan, where, needs_grad).transpose(-1, -2)
