"""The tensors that a fused backend's attention returns; and captured maps' mean over the active heads, where a GPU's
kernel wrote every head's by itself.

A kernel that adds up the heads itself walks over all of them in one program, and a GPU's other processors stand idle.
So long as the maps by head are small, it is faster to write them and add them up afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..plan import RowPlan

__all__ = [
    "BY_HEAD_BYTES", "empty_bits", "empty_maps", "empty_results", "heads_added_up_after", "is_by_head", "mean_of_heads",
    "zeroed",
]  # fmt: skip

Attention = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]

# Beyond that the kernels add the heads up themselves: writing and reading this much takes a GPU longer than it saves.
BY_HEAD_BYTES = 2**24


def empty_results(query: Tensor, value: Tensor, rows: RowPlan, keep_layout: bool) -> tuple[Tensor, Tensor | None]:
    """Out and maps as a kernel is to write them: out (B, H, M, Dv) in the value's dtype; maps, float32, (B, T, M) or
    (B, H, T, M), None without capture. keep_layout: see `attention` of the backends."""
    (b, h, m, _), dv = query.shape, value.shape[3]
    if keep_layout and query.stride(1) < query.stride(2):
        out = torch.empty((b, m, h, dv), dtype=value.dtype, device=query.device).transpose(1, 2)
    else:
        out = torch.empty((b, h, m, dv), dtype=value.dtype, device=query.device)
    return out, empty_maps(query, h, rows)


def empty_maps(x: Tensor, heads: int, rows: RowPlan) -> Tensor | None:
    """Maps, as above, of x (B, ..., M, D)."""
    if rows.capture_tokens is None:
        return None
    b, m, count = x.shape[0], x.shape[-2], rows.capture_tokens.shape[0]
    shape = (b, count, m) if rows.capture_mean else (b, heads, count, m)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def empty_bits(query: Tensor, tokens: int) -> Tensor:
    """(B, H, M, ceil(tokens / 32)) int32, one bit an entry, as a kernel is to write it."""
    return torch.empty((*query.shape[:3], (tokens + 31) // 32), dtype=torch.int32, device=query.device)


def zeroed(out: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The results where there is no row, or rows over no token."""
    return out.zero_(), None if maps is None else maps.zero_()


def heads_added_up_after(attention: Attention) -> Attention:
    """A GPU backend's `attention`, small maps' mean over the heads taken after it."""

    @functools.wraps(attention)
    def whole(query, key, value, bias, scale, rows, return_bits=False, keep_layout=False):  # type: ignore[no-untyped-def]
        if not is_by_head(rows, *query.shape[:3]):
            return attention(query, key, value, bias, scale, rows, return_bits, keep_layout)
        out, maps, bits = attention(query, key, value, bias, scale, rows.by_head(), return_bits, keep_layout)
        assert maps is not None
        return out, mean_of_heads(maps, rows), bits

    return whole


def is_by_head(rows: RowPlan, batch: int, heads: int, pixels: int) -> bool:
    """Whether a mean over heads is to be taken of maps that a kernel wrote by head."""
    tokens = rows.capture_tokens
    if tokens is None or not rows.capture_mean:
        return False
    return 4 * batch * heads * tokens.shape[0] * pixels <= BY_HEAD_BYTES


def mean_of_heads(maps: Tensor, rows: RowPlan) -> Tensor:
    """(B, T, M) float32 of maps (B, H, T, M) float32: over the heads that run the program, zeros where none does."""
    if rows.head_mode is None:
        return maps.mean(1) if maps.shape[1] else maps.sum(1)
    active = rows.head_mode == 0
    # Where an inactive head's map is infinite or no number, it is nothing to the mean.
    maps = torch.where(active[:, None, None], maps, 0.0)
    return maps.sum(1) / active.sum().clamp(min=1)
