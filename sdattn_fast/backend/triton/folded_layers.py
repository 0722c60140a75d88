"""Folded layers: attention over text into which projections are multiplied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...plan import Plan, RowPlan
from ...streams import to_device
from ..devices import on_device
from ..layout import check_contiguous, with_rows
from ..limits import full_bias
from . import gpu, launch
from .arguments import LOG2E, bucket, content_first, in_units, row_strides_of
from .launch import Call
from .tiles import choose_tiles, next_power_of_2

__all__ = ["PackedFoldedText", "block_shape", "folded", "folded_call", "folded_refusal", "pack"]

_BLOCK = 1024  # rows whose probabilities exist at a time


@dataclass(frozen=True)
class PackedFoldedText:
    """A folded layer's text: keys (B, H', N', D) and values (B, H', N', Dv), tokens in the kernel's order. H' heads
    that are not zero, N tokens rounded up to 16 with zeros; heads: (H',) int32, which they are, None for all."""

    key: Tensor
    value: Tensor
    heads: Tensor | None
    sizes: tuple[int, int, int, int, int]  # B, H, N, D, Dv

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.key, self.value, self.heads) if x is not None]


def folded_refusal(x: Tensor, plan: Plan) -> str | None:
    """Why a folded layer on rows like x (B, M, C) is not served, or None."""
    kind = "cpu" if gpu.interprets() else "cuda"
    if x.device.type != kind:
        return f"x is on {x.device}, not on a {kind} device"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the folded kernel takes float16 and bfloat16, not {x.dtype}: what lies between its halves is half"
    if x.dtype == torch.bfloat16 and kind == "cpu":
        return "x is bfloat16, whose products Triton's interpreter computes wrongly (triton #11584)"
    if plan.rows.capture_tokens is not None:
        return "maps are captured, which the folded kernel does not do"
    return None


def pack(key: Tensor, value: Tensor, rows: RowPlan, heads_there: list[int] | None = None) -> PackedFoldedText:
    """Bring key (B, H, N, D) and value (B, H, N, Dv) into the kernel's order, for many calls of `folded`. heads_there:
    those that do not give zeros, None for all; the others cost nothing."""
    b, h, n, d = key.shape
    dv, heads = value.shape[3], None
    if heads_there is not None:
        heads = to_device(torch.tensor(heads_there, dtype=torch.long), key.device)
        key, value = key[:, heads], value[:, heads]
    if rows.content is not None:
        order = content_first(rows.content).long()[:, None, :, None].expand(-1, key.shape[1], -1, -1)
        key, value = (x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (key, value))
    key, value = (pad(x, (0, 0, 0, -n % 16)).contiguous() for x in (key, value))
    return PackedFoldedText(key, value, None if heads is None else heads.to(torch.int32), (b, h, n, d, dv))


def folded(
    x: Tensor,
    packed: PackedFoldedText,
    summed: bool,
    bias: Tensor | None,
    out_bias: Tensor | None,
    scale: float,
    rows: RowPlan,
) -> tuple[Tensor, None]:
    """A folded layer: attention in which all heads share one query, or add to one output, or both.

    Our kernel goes from x to the probabilities of at most 1024 pixels, in x's dtype; a library's product with the
    values and `out_bias` goes on to y.

    Args:
        x: (B, M, D), one query for all heads, or (B, H, M, D).
        packed: of the same dtype, made with the same plan.
        summed: the output is the sum over the heads.
        bias: broadcasts to (B, H, M, N), added to the logits.
        out_bias: (Dv,), of x's dtype, added to the sum over the heads.

    Returns: y (B, M, Dv) if summed, else (B, H, M, Dv); and None, for there are no maps.
    """
    b, h, n, _, dv = packed.sizes
    m, x = x.shape[-2], with_rows(x)
    y = torch.empty((b, m, dv) if summed else (b, h, m, dv), dtype=x.dtype, device=x.device)
    if packed.key.shape[1] == 0 or n == 0:  # no head is there: nothing but the bias
        return y.zero_() if out_bias is None else y.copy_(out_bias.expand_as(y)), None
    from ...kernels import folded_kernel

    with on_device(x.device):
        for first in range(0, m, _BLOCK):
            end = min(first + _BLOCK, m)
            p = torch.empty(block_shape(packed, summed, end - first), dtype=x.dtype, device=x.device)
            programs, arguments, options = folded_call(x, packed, bias, scale, rows, p, first, end, summed)
            launch.launch(folded_kernel, programs, arguments, options)
            if not summed:
                part = p @ packed.value
                if packed.heads is None:
                    y[:, :, first:end] = part
                else:
                    y[:, :, first:end] = 0
                    y[:, packed.heads.long(), first:end] = part
            elif out_bias is None:
                torch.bmm(p.flatten(2), packed.value.flatten(1, 2), out=y[:, first:end])
            else:
                torch.baddbmm(out_bias, p.flatten(2), packed.value.flatten(1, 2), out=y[:, first:end])
    return y, None


def block_shape(packed: PackedFoldedText, summed: bool, rows: int) -> tuple[int, ...]:
    """Of the probabilities: a pixel's heads side by side where they are summed, else a head's pixels."""
    b, heads, columns, _ = packed.key.shape
    return (b, rows, heads, columns) if summed else (b, heads, rows, columns)


def folded_call(
    x: Tensor,
    packed: PackedFoldedText,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    p: Tensor,
    first: int,
    end: int,
    summed: bool,
) -> Call:
    """How `folded_kernel` is called for the rows from first to before end."""
    b, h, n, d = packed.sizes[:4]
    heads, columns = packed.key.shape[1:3]
    programmed = rows.content is not None and rows.max_content > 0
    content = rows.content if programmed else None
    tiles = choose_tiles(
        n, d, 16, 2, rows.max_content if programmed else None, end - first, b * heads, gpu.num_sms(x.device), False
    )
    # The columns are permuted wherever there are token classes, since `pack` cannot know more than that.
    order = None if rows.content is None else rows.derive("order", rows.content, content_first)
    gate = rows.gate if programmed else None
    bias = full_bias(bias, b, h, x.shape[-2], n)
    groups = -(-(end - first) // tiles.BM)
    check_contiguous(packed.key, content, gate, rows.phrases, rows.drop, rows.seed, rows.head_mode, packed.heads)
    x_b, x_h, x_m = row_strides_of(x[:, None] if x.dim() == 3 else x)
    p_b, p_h, p_m = (p.stride(0), p.stride(2), p.stride(1)) if summed else p.stride()[:3]
    unit, strides = in_units(x_b, x_h, x_m, *row_strides_of(packed.key))
    arguments = (
        x, packed.key, bias, p, order, content, gate, rows.phrases if programmed else None,
        rows.drop if programmed else None, rows.seed if programmed else None, rows.head_mode, packed.heads,
        float(scale) * LOG2E, float(rows.random_ratio), float(rows.threshold),
        *strides, p_b, p_h, p_m, *((0, 0, 0, 0) if bias is None else bias.stride()),
        0 if gate is None else gate.stride(0), 0 if gate is None or gate.shape[1] == 1 else n,
        first, end, groups,
    )  # fmt: skip
    options = dict(
        HEADS=heads, N=n, D=d, NA=tiles.NA, NB=tiles.NB, NP=columns, DA=min(64, next_power_of_2(d)), BM=tiles.BM,
        UNIT=unit,
        DROP=bucket(rows.max_drop) if programmed and rows.drop is not None else 0,
        RANDOM=programmed and rows.random_ratio >= 0, NMS=programmed and rows.threshold >= 0,
        RENORM=rows.renormalize if programmed else 0, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return groups * b * heads, arguments, options
