"""The fused backends as torch.library custom ops, so that torch.compile takes them whole.

Eager code calls the backend modules directly: a custom op costs tens of microseconds a call, as much as a small layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import PicturePlan, RowPlan
from . import fused

__all__ = ["attention", "picture_attention", "smooth"]

_ROWS_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, Tensor? content, Tensor? gate, "
    "Tensor? phrases, Tensor? drop, float random_ratio, Tensor? seed, float threshold, int renormalize, "
    "Tensor? head_mode, Tensor? capture_tokens, bool capture_final, bool capture_mean, SymInt max_content, "
    "SymInt max_drop, bool return_bits, str backend) -> (Tensor, Tensor, Tensor)"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    backend: str,
    return_bits: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A fused backend's `attention` through the op ``sdattn_fast::rows``."""
    out, maps, bits = torch.ops.sdattn_fast.rows(
        query, key, value, bias, scale, rows.content, rows.gate, rows.phrases, rows.drop, rows.random_ratio, rows.seed,
        rows.threshold, rows.renormalize, rows.head_mode, rows.capture_tokens, rows.capture_final, rows.capture_mean,
        rows.max_content, rows.max_drop, return_bits, backend,
    )  # fmt: skip
    return out, maps if rows.capture_tokens is not None else None, bits if return_bits else None


def picture_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    picture: PicturePlan,
    grid: tuple[int, int] | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """A fused backend's `picture_attention` through the op ``sdattn_fast::picture``."""
    height, width = (0, 0) if grid is None else grid
    out, maps = torch.ops.sdattn_fast.picture(
        query, key, value, bias, scale, rows.content, rows.gate, rows.phrases, rows.drop, rows.random_ratio, rows.seed,
        rows.threshold, rows.renormalize, rows.head_mode, rows.capture_tokens, rows.capture_final, rows.capture_mean,
        rows.max_content, rows.max_drop, picture.steps, picture.sigma, picture.drop_ratio, picture.nms, picture.active,
        height, width, backend,
    )  # fmt: skip
    return out, maps if rows.capture_tokens is not None else None


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None, backend: str) -> Tensor:
    """A fused backend's `smooth` through the op ``sdattn_fast::smooth``."""
    return torch.ops.sdattn_fast.smooth(x, grid[0], grid[1], sigma, times, where, backend)


@torch.library.custom_op("sdattn_fast::rows", mutates_args=(), schema=_ROWS_SCHEMA)
def _rows(
    query, key, value, bias, scale, content, gate, phrases, drop, random_ratio, seed, threshold, renormalize, head_mode,
    capture_tokens, capture_final, capture_mean, max_content, max_drop, return_bits, backend,
):  # fmt: skip
    rows = RowPlan(
        content, gate, phrases, drop, random_ratio, seed, threshold, renormalize, head_mode, capture_tokens,
        capture_final, capture_mean, max_content, max_drop,
    )  # fmt: skip
    out, maps, bits = fused(backend).attention(query, key, value, bias, scale, rows, return_bits=return_bits)
    none = torch.empty(0, device=query.device)
    return out, none if maps is None else maps, none.to(torch.int32) if bits is None else bits


@_rows.register_fake
def _rows_fake(
    query, key, value, bias, scale, content, gate, phrases, drop, random_ratio, seed, threshold, renormalize, head_mode,
    capture_tokens, capture_final, capture_mean, max_content, max_drop, return_bits, backend,
):  # fmt: skip
    b, h, m, _ = query.shape
    out = value.new_empty(b, h, m, value.shape[3])
    maps, bits = query.new_empty(0, dtype=torch.float32), query.new_empty(0, dtype=torch.int32)
    if capture_tokens is not None:
        t = capture_tokens.shape[0]
        maps = query.new_empty((b, t, m) if capture_mean else (b, h, t, m), dtype=torch.float32)
    if return_bits:
        bits = query.new_empty(b, h, m, (key.shape[2] + 31) // 32, dtype=torch.int32)
    return out, maps, bits


@torch.library.custom_op(
    "sdattn_fast::picture",
    mutates_args=(),
    schema=_ROWS_SCHEMA.replace(
        "bool return_bits, str backend) -> (Tensor, Tensor, Tensor)",
        "int steps, float sigma, float drop_ratio, bool nms, Tensor? active, SymInt height, SymInt width, str backend) "
        "-> (Tensor, Tensor)",
    ),
)
def _picture(
    query, key, value, bias, scale, content, gate, phrases, drop, random_ratio, seed, threshold, renormalize, head_mode,
    capture_tokens, capture_final, capture_mean, max_content, max_drop, steps, sigma, drop_ratio, nms, active, height,
    width, backend,
):  # fmt: skip
    rows = RowPlan(
        content, gate, phrases, drop, random_ratio, seed, threshold, renormalize, head_mode, capture_tokens,
        capture_final, capture_mean, max_content, max_drop,
    )  # fmt: skip
    picture, grid = PicturePlan(steps, sigma, drop_ratio, nms, active), (height, width)
    out, maps = fused(backend).picture_attention(query, key, value, bias, scale, rows, picture, grid)
    return out, torch.empty(0, device=query.device) if maps is None else maps


@_picture.register_fake
def _picture_fake(
    query, key, value, bias, scale, content, gate, phrases, drop, random_ratio, seed, threshold, renormalize, head_mode,
    capture_tokens, capture_final, capture_mean, max_content, max_drop, steps, sigma, drop_ratio, nms, active, height,
    width, backend,
):  # fmt: skip
    b, h, m, _ = query.shape
    maps = query.new_empty(0, dtype=torch.float32)
    if capture_tokens is not None:
        t = capture_tokens.shape[0]
        maps = query.new_empty((b, t, m) if capture_mean else (b, h, t, m), dtype=torch.float32)
    return value.new_empty(b, h, m, value.shape[3]), maps


@torch.library.custom_op(
    "sdattn_fast::smooth",
    mutates_args=(),
    schema="(Tensor x, SymInt height, SymInt width, float sigma, int times, Tensor? where, str backend) -> Tensor",
)
def _smooth(x, height, width, sigma, times, where, backend):
    return fused(backend).smooth(x, (height, width), sigma, times, where)


@_smooth.register_fake
def _smooth_fake(x, height, width, sigma, times, where, backend):
    return x.new_empty(x.shape)
