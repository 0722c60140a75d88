"""What the fused kernels of all backends take: sizes, dtypes, devices and layouts."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .layout import has_rows

__all__ = ["DTYPES", "MAX_SIZE", "beyond_limits"]

MAX_SIZE = 256  # N, D and Dv
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the kernels on GPUs


def beyond_limits(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, device_type: str, dtypes: Collection[torch.dtype]
) -> list[str]:
    """What of a call's tensors kernels on "cpu" or "cuda" devices do not take; looks at shapes, strides, dtypes and
    devices alone."""
    reasons = []
    for name, x in (("query", query), ("key", key), ("value", value), ("bias", bias)):
        if x is None:
            continue
        if x.device.type != device_type:
            reasons.append(f"{name} is on {x.device}, not on a {device_type} device")
        elif x.device != query.device:
            reasons.append(f"{name} is on {x.device} and query on {query.device}")
        if name == "bias":
            continue
        if x.dtype not in dtypes:
            reasons.append(f"{name} is {x.dtype}, not {_any_of(dtypes)}")
        elif x.dtype != query.dtype:
            reasons.append(f"{name} is {x.dtype} and query {query.dtype}")
        if not has_rows(x):
            reasons.append(f"{name}'s last dimension is not contiguous")
    if key.shape[2] > MAX_SIZE:
        reasons.append(f"{key.shape[2]} tokens, more than {MAX_SIZE}")
    if query.shape[3] > MAX_SIZE or value.shape[3] > MAX_SIZE:
        reasons.append(f"head dimension {max(query.shape[3], value.shape[3])}, more than {MAX_SIZE}")
    return reasons


def _any_of(dtypes: Collection[torch.dtype]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last
