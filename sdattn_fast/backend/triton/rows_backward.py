"""The Triton backend's backward pass: what is allocated, which tiles, three kernels launched.

`backward_kernel` gives dQ and, per group of tiles, partial sums of dK, dV, the gate's and a token bias's gradient;
`sum_kernel` adds the groups up in order. `shared_kernel` follows where heads or entries add to the same pixels: the
relevance, and the gradient of a bias by rows. Memory beside the results: the partial sums, N * (D + Dv) floats for each
of at most four programs a multiprocessor or one a head, whatever M.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...plan import RowPlan
from ..devices import on_device
from ..gradients import Gradients, incoming
from ..layout import check_contiguous, check_rows
from ..limits import full_bias
from . import gpu, launch
from .arguments import LOG2E, content_first, in_units, map_slots, row_strides_of
from .launch import Call
from .tiles import next_power_of_2, split

__all__ = ["backward", "backward_call", "shared_call", "sum_call", "choose_tiles"]


def backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    bits: Tensor | None,
    wanted: Sequence[bool],
    relevance_tokens: Tensor | None = None,
    relevance_heads: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `attention` as of `cpu.backward`, the same numbers every time on the same device.

    Raises: KernelRefused.
    """
    grads = Gradients.empty(query, key, value, bias, rows.gate, wanted, relevance_tokens)
    if 0 in (*query.shape[:3], key.shape[2]):
        grads.zero()
        return grads.results(bias, rows)
    grad_out, grad_maps = incoming(grad_out, grad_maps, query, value)
    call = _Call(query, key, value, bias, scale, rows, bits, grad_out, grad_maps)
    with on_device(query.device):
        if any(x is not None for x in grads.sums):
            _sums_over_rows(call, grads)
        if grads.bias is not None or grads.relevance is not None:
            from ...kernels import shared_kernel

            programs, arguments, options = shared_call(
                call, grads.bias, grads.relevance, relevance_tokens, relevance_heads
            )
            launch.launch(shared_kernel, programs, arguments, options)
    return grads.results(bias, rows)


@dataclass(frozen=True)
class _Call:
    """A call of `attention`, what it decided, and the gradients that come in; nothing is empty."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scale: float
    rows: RowPlan
    bits: Tensor | None
    grad_out: Tensor
    grad_maps: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, H, M, N, D, Dv."""
        return (*self.query.shape[:3], self.key.shape[2], self.query.shape[3], self.value.shape[3])

    @property
    def programmed(self) -> bool:
        return self.rows.content is not None and self.rows.max_content > 0

    @property
    def full_bias(self) -> Tensor | None:
        return full_bias(self.bias, *self.sizes[:4])

    def pointers(self, permuted: bool) -> tuple[Any, ...]:
        """What both kernels begin with, Query to Slots."""
        rows = self.rows
        check_contiguous(self.grad_maps, self.bits, rows.content, rows.gate, rows.phrases, rows.head_mode)
        content = rows.content if self.programmed else None
        order = slots = None
        if content is not None and permuted:
            order = rows.derive("order", content, content_first)
        if self.grad_maps is not None and rows.capture_tokens is not None:
            n = self.sizes[3]
            slots = rows.derive("slots", rows.capture_tokens, lambda tokens: map_slots(tokens, n))
        return (
            self.query, self.key, self.value, self.full_bias, self.grad_out, self.grad_maps,
            self.bits if content is not None else None, order, content,
            rows.gate if content is not None else None, rows.phrases if content is not None else None,
            rows.head_mode, slots,
        )  # fmt: skip

    def strides_of_gate(self) -> tuple[int, int]:
        gate = self.rows.gate if self.programmed else None
        return (0, 0) if gate is None else (gate.stride(0), 0 if gate.shape[1] == 1 else self.sizes[3])

    def constants(self) -> dict[str, Any]:
        _, h, _, n, d, dv = self.sizes
        return dict(
            H=h, N=n, D=d, DV=dv, RENORM=self.rows.renormalize if self.programmed else 0,
            FINAL=self.rows.capture_final, MEAN=self.rows.capture_mean,
            PRECISION=gpu.precision(self.query.device),
        )  # fmt: skip

    def unit(self, *more: Tensor | None) -> tuple[int, tuple[int, ...]]:
        """The unit of strides, and those of query, key, value, the gradient of out and `more`, in it."""
        of = (self.query, self.key, self.value, self.grad_out, *more)
        return in_units(*(s for x in of for s in ((0, 0, 0) if x is None else row_strides_of(x))))


def _sums_over_rows(call: _Call, grads: Gradients) -> None:
    from ...kernels import backward_kernel, sum_kernel

    b, h, _, n, d, dv = call.sizes
    of_query, of_key, of_value, of_gate, of_tokens = grads.sums
    channels = (d if of_key is not None else 0) + (dv if of_value is not None else 0)
    tiles = _tiles(call, channels > 0, of_gate is not None or of_tokens is not None)
    on: dict[str, Any] = {"dtype": torch.float32, "device": call.query.device}
    sums = torch.empty((b, h, tiles.groups, n, channels), **on) if channels else None
    # No content, no gradient: the kernel writes none.
    gate_sums = torch.zeros((b, h, tiles.groups, n), **on) if of_gate is not None else None
    bias_sums = torch.empty((b, h, tiles.groups, n), **on) if of_tokens is not None else None
    programs, arguments, options = backward_call(call, tiles, of_query, of_key, of_value, sums, gate_sums, bias_sums)
    launch.launch(backward_kernel, programs, arguments, options)
    for partial, first, second in ((sums, of_key, of_value), (gate_sums, of_gate, None), (bias_sums, of_tokens, None)):
        if partial is not None:
            programs, arguments, options = sum_call(partial, first, second)
            launch.launch(sum_kernel, programs, arguments, options)


@dataclass(frozen=True)
class BackwardTiles:
    """The constants of a launch. NA, NB: columns of the two tiles; DA: channels that a product takes at a time; C: the
    channels that a program sums; SLICES: programs that share a head's channels; BM: rows; TILES: tiles of rows that one
    program walks over; STREAM: keys and values do not stay. groups: programs of a head and slice."""

    NA: int
    NB: int
    DA: int
    C: int
    SLICES: int
    BM: int
    TILES: int
    STREAM: bool
    groups: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, Any]:
        names = ("NA", "NB", "DA", "C", "SLICES", "BM", "TILES", "STREAM", "num_warps", "num_stages")
        return {name: getattr(self, name) for name in names}


@functools.cache
def choose_tiles(
    n: int, d: int, dv: int, size: int, most_content: int | None, pixels: int, heads: int, processors: int,
    sums: bool, walks: bool,
) -> BackwardTiles:  # fmt: skip
    """Tiles, as `tiles.choose_tiles`. sums: dK or dV is wanted; walks: anything that is summed over rows is."""
    na, nb = _columns(n, most_content)
    widest, wide = next_power_of_2(max(d, dv)), na + nb > 160
    stream = size == 4 or na >= 128 or wide or widest > 64
    bm = 16 if size == 4 or na >= 128 or wide else 32
    c = widest
    if sums:
        # As many channels as leave room for the rows beside their sums: what more takes spills.
        c = min(widest, 32 if size == 4 or wide else 64 if na >= 128 or widest > 128 else 128)
    da = min(16 if size == 4 else 32, c)
    slices = -(-max(d, dv) // c)
    tiles = -(-pixels // bm)
    walk = 1
    while walk * 2 <= tiles and tiles // (walk * 2) * heads * slices >= 2 * processors and (walks or walk < 8):
        walk *= 2
    return BackwardTiles(
        na, nb, da, c, slices, bm, walk, stream, -(-tiles // walk), 8, 2 if stream and size == 2 else 1
    )


def _tiles(call: _Call, sums: bool, walks: bool) -> BackwardTiles:
    b, h, m, n, d, dv = call.sizes
    most = call.rows.max_content if call.programmed else None
    processors = gpu.num_sms(call.query.device)
    return choose_tiles(n, d, dv, call.query.element_size(), most, m, b * h, processors, sums, sums or walks)


def _columns(n: int, most_content: int | None) -> tuple[int, int]:
    if most_content is None:
        return split(n)
    na = min(next_power_of_2(most_content), next_power_of_2(n))
    return na, next_power_of_2(n - na) if n > na else 0


def backward_call(
    call: _Call,
    tiles: BackwardTiles,
    of_query: Tensor | None,
    of_key: Tensor | None,
    of_value: Tensor | None,
    sums: Tensor | None,
    gate_sums: Tensor | None,
    bias_sums: Tensor | None,
) -> Call:
    """How `backward_kernel` is called."""
    b, h, m = call.sizes[:3]
    bias, grad_maps = call.full_bias, call.grad_maps
    unit, strides = call.unit(of_query)
    arguments = (
        *call.pointers(tiles.NB > 0), of_query, sums, gate_sums, bias_sums,
        float(call.scale) * LOG2E, float(call.scale), *strides,
        *((0, 0, 0, 0) if bias is None else bias.stride()), *call.strides_of_gate(),
        m, 0 if grad_maps is None else grad_maps.shape[-2], tiles.groups,
    )  # fmt: skip
    options = {
        **call.constants(), **tiles.constants(), "UNIT": unit,
        "KEYS": of_key is not None, "VALUES": of_value is not None,
    }  # fmt: skip
    return tiles.groups * tiles.SLICES * b * h, arguments, options


def sum_call(sums: Tensor, first: Tensor | None, second: Tensor | None) -> Call:
    """How `sum_kernel` is called: sums (B, H, groups, N, C) to (B, H, N, ...), or (B, H, groups, N) to (B, H, N)."""
    if sums.dim() == 4:
        sums, first = sums[..., None, :], None if first is None else first[:, :, None]
    b, h, groups, n, channels = sums.shape
    check_rows(sums, first, second)
    counts = [0 if x is None else x.shape[3] for x in (first, second)]
    bn, bc = min(8, 1 << (n - 1).bit_length()), min(128, next_power_of_2(channels))
    blocks = -(-n // bn)
    strides = [s for x in (first, second) for s in ((0, 0, 0) if x is None else x.stride()[:3])]
    options = dict(H=h, N=n, CF=counts[0], CS=counts[1], BN=bn, BC=bc, num_warps=4)
    return blocks * -(-channels // bc) * b * h, (sums, first, second, groups, *strides, blocks), options


def shared_call(
    call: _Call,
    of_rows: Tensor | None,
    relevance: Tensor | None,
    relevance_tokens: Tensor | None,
    relevance_heads: Tensor | None,
) -> Call:
    """How `shared_kernel` is called. of_rows: like the bias, of four dimensions, float32."""
    b, h, m, n, d, dv = call.sizes
    na, nb = _columns(n, call.rows.max_content if call.programmed else None)
    small = call.query.element_size() == 2
    wide = na + nb > 160
    bm = 16 if wide and not small else 32
    tiles = -(-m // bm)
    entries = b if of_rows is not None and of_rows.shape[0] == 1 else 1
    heads = h if relevance is not None or (of_rows is not None and of_rows.shape[1] == 1) else 1
    slots = None
    if relevance is not None and relevance_tokens is not None:
        slots = map_slots(relevance_tokens, n)
    check_contiguous(relevance, relevance_heads)
    strides_of_rows = (0, 0, 0, 0) if of_rows is None else of_rows.expand(b, h, m, n).stride()
    bias, grad_maps = call.full_bias, call.grad_maps
    unit, strides = call.unit()
    arguments = (
        *call.pointers(nb > 0), of_rows, relevance, slots, relevance_heads if relevance is not None else None,
        float(call.scale) * LOG2E, *strides,
        *((0, 0, 0, 0) if bias is None else bias.stride()), *strides_of_rows, *call.strides_of_gate(),
        m, 0 if grad_maps is None else grad_maps.shape[-2], 0 if relevance is None else relevance.shape[1],
        tiles, h // heads,
    )  # fmt: skip
    options = dict(
        **call.constants(), NA=na, NB=nb, DA=min(32 if small else 16, next_power_of_2(max(d, dv))), BM=bm, UNIT=unit,
        ENTRIES=entries, HEADS=heads, num_warps=8 if wide else 4, num_stages=2,
    )  # fmt: skip
    return tiles * (h // heads) * (b // entries), arguments, options
