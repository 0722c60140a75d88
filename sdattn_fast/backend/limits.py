"""What the fused kernels of all backends take: sizes, dtypes, devices, layouts, gradients, programs."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..plan import Plan
from .layout import has_rows

__all__ = ["DTYPES", "MAX_SIZE", "beyond_limits", "full_bias", "no_picture_gradients"]

MAX_SIZE = 256  # N, D and Dv
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the kernels on GPUs


def beyond_limits(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, device_type: str, dtypes: Collection[torch.dtype]
) -> list[str]:
    """What of a call's tensors kernels on "cpu" or "cuda" devices do not take; looks at shapes, strides, dtypes and
    devices alone."""
    reasons = []
    dtype, device = query.dtype, query.device
    for name, x in (("query", query), ("key", key), ("value", value), ("bias", bias)):
        if x is None:
            continue
        if x.device.type != device_type:
            reasons.append(f"{name} is on {x.device}, not on a {device_type} device")
        elif x.device != device:
            reasons.append(f"{name} is on {x.device} and query on {device}")
        if name == "bias":
            continue
        if x.dtype not in dtypes:
            reasons.append(f"{name} is {x.dtype}, not {_any_of(dtypes)}")
        elif x.dtype != dtype:
            reasons.append(f"{name} is {x.dtype} and query {dtype}")
        if not has_rows(x):
            reasons.append(f"{name}'s last dimension is not contiguous")
    if key.shape[2] > MAX_SIZE:
        reasons.append(f"{key.shape[2]} tokens, more than {MAX_SIZE}")
    if query.shape[3] > MAX_SIZE or value.shape[3] > MAX_SIZE:
        reasons.append(f"head dimension {max(query.shape[3], value.shape[3])}, more than {MAX_SIZE}")
    return reasons


def no_picture_gradients(plan: Plan, needs_grad: bool) -> list[str]:
    """That kernels have no gradients of a program that looks over the picture, where they are asked for them."""
    if not needs_grad or plan.picture is None:
        return []
    return ["gradients are asked for of a program that looks over the picture, which has no backward kernel"]


def full_bias(bias: Tensor | None, *shape: int, dtypes: Collection[torch.dtype] = DTYPES) -> Tensor | None:
    """The bias as kernels read it: expanded to (B, H, M, N), in a dtype that they take."""
    if bias is None:
        return None
    return (bias if bias.dtype in dtypes else bias.to(torch.float32)).expand(shape)


def _any_of(dtypes: Collection[torch.dtype]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last
