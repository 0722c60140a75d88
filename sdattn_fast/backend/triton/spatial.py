"""Attention whose program looks over the picture (`axis="space"`, or several rounds), in several launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...plan import PicturePlan, RowPlan
from ..devices import on_device
from ..layout import check_contiguous
from ..limits import full_bias
from ..results import empty_results, mean_of_heads, zeroed
from . import gpu, launch
from .arguments import LOG2E, bucket, map_slots, row_strides_of
from .launch import Call
from .smoothing import smooth
from .tiles import next_power_of_2

__all__ = ["picture_attention", "picture_call"]


def picture_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    picture: PicturePlan,
    grid: tuple[int, int] | None,
    keep_layout: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attention` of a program that looks over the picture, all but its last smoothing. grid: (height, width).

    Memory beside the results: with one round histograms alone, 8 KiB a token and head; with more the map (B, H, M, N)
    in float32, three times while it is smoothed. Captured maps are kept by head before their mean is taken.

    Returns: out and maps, as `attention`.
    """
    b, h, m, _ = query.shape
    n = key.shape[2]
    on: dict[str, Any] = {"device": query.device}
    out, maps = empty_results(query, value, rows.by_head(), keep_layout)
    if b * h * m == 0 or n == 0:
        out, maps = zeroed(out, maps)
        return out, mean_of_heads(maps, rows) if maps is not None and rows.capture_mean else maps
    content = rows.content
    assert content is not None

    drop = picture.dropped(m)
    found = torch.zeros((b, h, n), dtype=torch.int32, **on) if drop > 0 else None
    histogram = torch.empty((b, h, n, 2048), dtype=torch.int32, **on) if drop > 0 else None
    highest = torch.empty((b, h, n), dtype=torch.int32, **on) if picture.nms else None
    p = mass = None
    if picture.steps > 1:
        p = torch.empty((b, h, m, n), dtype=torch.float32, **on)
        mass = torch.empty((b, h, m), dtype=torch.float32, **on)
    call = functools.partial(
        _launch_picture, query, key, value, bias, scale, rows, picture, out, maps, histogram, found, highest
    )
    if p is not None:
        call("begin", p, mass)
    if found is not None and histogram is not None:
        _find_kth(functools.partial(call, "count", p, mass), histogram, found, drop)
    where = None if picture.active is None else picture.active[:, None]
    if rows.head_mode is not None:
        heads = (rows.head_mode == 0)[None]
        where = heads.expand(b, h) if where is None else (where != 0) & heads
    for step in range(picture.steps):
        first, last = step == 0, step + 1 == picture.steps
        if highest is not None:
            highest.zero_()
            call("highest", p, mass, first=first)
        call("last" if last else "round", p, mass, first=first)
        if not last and picture.sigma > 0:
            assert p is not None and grid is not None
            p = smooth(p, grid, picture.sigma, 1, where)
    return out, mean_of_heads(maps, rows) if maps is not None and rows.capture_mean else maps


_LEVELS = ((20, 11), (10, 10), (0, 10))  # shift and bits of the histograms


def _find_kth(count: Callable[..., None], histogram: Tensor, found: Tensor, k: int) -> None:
    """Makes of `found`, zeros (B, H, N), the bits of the k-th largest float32 of every content token's map; for other
    tokens it means nothing."""
    left = torch.full(found.shape, k, dtype=torch.int64, device=found.device)
    for shift, bits in _LEVELS:
        histogram.zero_()
        count(shift=shift, bits=bits)
        above = histogram[..., : 1 << bits].flip(-1).cumsum(-1)
        passed = (above < left[..., None]).sum(-1).clamp(max=(1 << bits) - 1)
        left -= torch.where(passed > 0, above.gather(-1, (passed - 1).clamp(min=0)[..., None])[..., 0], 0)
        found.copy_((found << bits) | ((1 << bits) - 1 - passed).to(torch.int32))


def _launch_picture(
    query, key, value, bias, scale, rows, picture, out, maps, histogram, found, highest, stage, p, mass, **how
) -> None:
    from ...kernels import picture_kernel

    with on_device(query.device):
        programs, arguments, options = picture_call(
            query, key, value, bias, scale, rows, picture, out, maps, histogram, found, highest, stage, p, mass, **how
        )
        launch.launch(picture_kernel, programs, arguments, options)


_STAGES = {"begin": -1, "count": 0, "highest": 1, "round": 2, "last": 2}


def picture_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    picture: PicturePlan,
    out: Tensor,
    maps: Tensor | None,
    histogram: Tensor | None,
    found: Tensor | None,
    highest: Tensor | None,
    stage: str,
    p: Tensor | None,
    mass: Tensor | None,
    first: bool = True,
    shift: int = 0,
    bits: int = 0,
) -> Call:
    """How `picture_kernel` is called. p None: the probabilities are computed anew, by one kernel for all stages."""
    b, h, m, d = query.shape
    n, dv = key.shape[2], value.shape[3]
    na = next_power_of_2(n)
    # All columns in one tile: 32 rows of 128 are 32 registers a thread, and float32 products take as many again.
    bm = 16 if na > 128 or query.element_size() == 4 else 32
    groups = -(-m // bm)
    gate, captured = rows.gate, rows.capture_tokens
    slots = None if captured is None else rows.derive("slots", captured, lambda tokens: map_slots(tokens, n))
    bias = full_bias(bias, b, h, m, n)
    check_contiguous(
        maps, p, mass, rows.content, gate, rows.phrases, rows.drop, rows.seed, rows.head_mode, picture.active
    )
    arguments = (
        query, key, value, bias, out, p, mass, maps, rows.content, gate, rows.phrases, rows.drop, rows.seed,
        rows.head_mode, picture.active, slots, histogram, found, highest,
        float(scale) * LOG2E, float(rows.random_ratio), float(rows.threshold),
        *row_strides_of(query, key, value, out),
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        0 if gate is None else gate.stride(0), 0 if gate is None or gate.shape[1] == 1 else n,
        m, 0 if maps is None else maps.shape[2], groups, _STAGES[stage], shift, bits,
    )  # fmt: skip
    options = dict(
        H=h, N=n, D=d, DV=dv, NA=na, DA=min(32, next_power_of_2(d)), VA=min(32, next_power_of_2(dv)), BM=bm,
        STAGE="anew" if p is None else stage, FIRST=first,
        DROP=bucket(rows.max_drop) if rows.drop is not None else 0,
        RANDOM=rows.random_ratio >= 0, NMS=0 if rows.threshold < 0 else 2 if picture.nms else 1,
        RENORM=rows.renormalize, FINAL=rows.capture_final, PRECISION=gpu.precision(query.device),
        num_warps=8 if na > 128 else 4, num_stages=2,
    )  # fmt: skip
    return groups * b * h, arguments, options
