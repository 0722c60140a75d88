"""Gaussian smoothing over the grid of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import gaussian_radius
from ..devices import on_device
from . import launch
from .arguments import in_units, strides_of
from .launch import Call
from .tiles import next_power_of_2

__all__ = ["smooth", "smooth_call"]


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None) -> Tensor:
    """A new tensor: x (B, H, height * width, C) convolved `times` times with the Gaussian over the grid where `where`,
    a (B, H) bool, says so (None: everywhere), else copied. `scipy.ndimage.gaussian_filter`'s radius and edges."""
    b, h = x.shape[:2]
    kept = x.dtype
    if x.numel() == 0 or times == 0 or gaussian_radius(sigma) == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if where is not None:
        where = where.to(torch.uint8).expand(b, h).contiguous()
    from ...kernels import smooth_kernel

    with on_device(x.device):
        for i in range(2 * times):
            y = torch.empty(x.shape, dtype=torch.float32 if i + 1 < 2 * times else kept, device=x.device)
            down = i % 2 == 0
            launch.launch_bound(
                smooth_kernel,
                (x, y, where),
                (x.dtype, y.dtype, x.shape, x.stride(), grid, sigma, down),
                lambda x=x, y=y, down=down: smooth_call(x, y, where, grid, sigma, down),  # type: ignore[misc]
            )
            x = y
    return x


def smooth_call(x: Tensor, y: Tensor, where: Tensor | None, grid: tuple[int, int], sigma: float, down: bool) -> Call:
    """How `smooth_kernel` is called for a pass along the height (down) or the width."""
    b, h, m, c = x.shape
    channels = min(128, next_power_of_2(c))
    pixels = 1024 // channels
    blocks = -(-m // pixels)
    unit, strides = in_units(*strides_of(x))
    radius = gaussian_radius(sigma)
    options = dict(
        C=c, RADIUS=radius, DOWN=down, NEAR=radius <= grid[0 if down else 1], BP=pixels, BC=channels, UNIT=unit,
        num_warps=4,
    )  # fmt: skip
    arguments = (x, y, where, float(sigma), *grid, *strides, x.stride(3), h, blocks)
    return blocks * -(-c // channels) * b * h, arguments, options
