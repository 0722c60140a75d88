"""Sums over all pairs of pixels, weighted by a Gaussian of their features: what the dense CRF needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..devices import on_device
from . import gpu, launch
from .arguments import LOG2E
from .launch import Call
from .tiles import next_power_of_2

__all__ = ["gaussian_attention", "gaussian_call"]


def gaussian_attention(features: Tensor, values: Tensor) -> Tensor:
    """(P, L) float32: the sums over j of exp(-|f_i - f_j|^2 / 2) values_j, for features (P, d <= 8) and values (P, L),
    both float32."""
    from ...kernels import gaussian_kernel

    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    if values.numel() == 0:
        return out
    with on_device(features.device):
        programs, arguments, options = gaussian_call(features, values, out)
        launch.launch(gaussian_kernel, programs, arguments, options)
    return out


def gaussian_call(features: Tensor, values: Tensor, out: Tensor) -> Call:
    """How `gaussian_kernel` is called."""
    pixels, labels = values.shape
    # Triton 3.2 never ends on this kernel's products in three TF32 parts, and 3.3 refuses them.
    precision = "ieee" if launch.version() < (3, 4) else gpu.precision(features.device)
    arguments = ((features * math.sqrt(0.5 * LOG2E)).contiguous(), values.contiguous(), out, pixels)
    options = dict(
        D=features.shape[1], L=labels, BL=next_power_of_2(labels), BM=64, BN=64, PRECISION=precision,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return -(-pixels // 64), arguments, options
