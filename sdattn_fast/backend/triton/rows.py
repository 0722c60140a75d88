"""Attention whose program looks at rows alone, in one launch."""

from __future__ import annotations

from torch import Tensor

from ...plan import RowPlan
from ..devices import on_device
from ..layout import check_contiguous
from ..limits import full_bias
from ..results import empty_bits, empty_results, heads_added_up_after, is_by_head, mean_of_heads, zeroed
from . import gpu, launch
from .arguments import LOG2E, bucket, content_first, in_units, map_slots, row_strides_of
from .launch import BoundLaunch, Call
from .tiles import choose_tiles, next_power_of_2

__all__ = ["BoundAttention", "attention", "rows_call", "rows_tensors"]

_MOVES = _QUERY, _OUT, _MAPS, _SEED = 0, 4, 5, 12  # among the tensors of `rows_tensors`, what is new at every call


@heads_added_up_after
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    return_bits: bool = False,
    keep_layout: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Steps 1 to 6 and 8 for every row, in one launch: (out, maps, bits) as of `cpu.attention`.

    Raises: KernelRefused.
    """
    b, h, m, _ = query.shape
    n = key.shape[2]
    out, maps = empty_results(query, value, rows, keep_layout)
    bits = empty_bits(query, n) if return_bits else None
    if b * h * m == 0 or n == 0:
        return *zeroed(out, maps), bits
    bias = full_bias(bias, b, h, m, n)
    _launch_rows(rows_tensors(query, key, value, bias, rows, out, maps, bits), scale, rows)
    return out, maps, bits


class BoundAttention:
    """`attention`, with out as the query lies, for queries and seeds that differ from the first ones in their numbers
    and addresses alone; the other tensors are kept."""

    def __init__(self, key: Tensor, value: Tensor, scale: float, rows: RowPlan) -> None:
        self._call = key, value, scale, rows
        self._by_head: BoundAttention | None = None
        # The launch, the first call's addresses, the tensors that stay. Replaced as a whole: threads may be reading.
        self._kept: tuple[BoundLaunch, list[int | None], tuple[Tensor | None, ...]] | None = None

    def __call__(self, query: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(out, maps). Raises: KernelRefused."""
        key, value, scale, rows = self._call
        if is_by_head(rows, *query.shape[:3]):
            if self._by_head is None:
                self._by_head = BoundAttention(key, value, scale, rows.by_head())
            out, maps = self._by_head(query, seed)
            assert maps is not None
            return out, mean_of_heads(maps, rows)
        out, maps = empty_results(query, value, rows, keep_layout=True)
        kept = self._kept
        if kept is not None:
            bound, first, _ = kept
            now = first.copy()
            now[_QUERY], now[_OUT] = query.data_ptr(), out.data_ptr()
            if maps is not None:
                now[_MAPS] = maps.data_ptr()
            if seed is not None:
                now[_SEED] = seed.data_ptr()
            # The kernel was compiled for how these lie.
            if all((now[i] or 0) % 16 == (first[i] or 0) % 16 for i in _MOVES):
                with on_device(query.device):
                    bound(now)
                return out, maps
        if out.numel() == 0 or key.shape[2] == 0:
            return zeroed(out, maps)
        rows = rows if seed is None else rows.with_seed(seed)
        tensors = rows_tensors(query, key, value, None, rows, out, maps, None)
        launched = _launch_rows(tensors, scale, rows)
        if launched is not None:
            stay = tuple(None if i in _MOVES else x for i, x in enumerate(tensors))
            self._kept = launched, [None if x is None else x.data_ptr() for x in tensors], stay
        return out, maps


def _launch_rows(tensors: tuple[Tensor | None, ...], scale: float, rows: RowPlan) -> BoundLaunch | None:
    from ...kernels import rows_kernel

    query, key, value, bias, out, maps, bits = tensors[:7]
    assert query is not None and key is not None and value is not None and out is not None
    gate = rows.gate
    like = (
        query.dtype, query.shape, key.shape[2], value.shape[3], query.stride(), key.stride(), value.stride(),
        out.stride(), None if maps is None else maps.shape, None if bias is None else (bias.dtype, bias.stride()),
        None if gate is None else gate.shape, scale, rows.random_ratio, rows.threshold, rows.renormalize,
        rows.capture_final, rows.capture_mean, rows.max_content, rows.max_drop,
    )  # fmt: skip
    with on_device(query.device):
        return launch.launch_bound(
            rows_kernel, tensors, like, lambda: rows_call(query, key, value, bias, scale, rows, out, maps, bits)
        )


def rows_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    out: Tensor,
    maps: Tensor | None,
    bits: Tensor | None,
) -> Call:
    """How `rows_kernel` is called."""
    b, h, m, d = query.shape
    n, dv = key.shape[2], value.shape[3]
    programmed = rows.content is not None and rows.max_content > 0
    mean = maps is not None and rows.capture_mean
    most = rows.max_content if programmed else None
    lean = bias is None and maps is None and bits is None
    tiles = choose_tiles(n, d, dv, query.element_size(), most, m, b * h, gpu.num_sms(query.device), mean, lean)
    gate = rows.gate if programmed else None
    groups = -(-m // (tiles.BM * (1 if mean else tiles.TILES)))
    unit, strides = in_units(*row_strides_of(query, key, value, out))
    bias = full_bias(bias, b, h, m, n)
    arguments = (
        *rows_tensors(query, key, value, bias, rows, out, maps, bits),
        float(scale) * LOG2E, float(rows.random_ratio), float(rows.threshold),
        *strides, *((0, 0, 0, 0) if bias is None else bias.stride()),
        0 if gate is None else gate.stride(0), 0 if gate is None or gate.shape[1] == 1 else n,
        m, 0 if maps is None else maps.shape[-2], groups,
    )  # fmt: skip
    options = dict(
        H=h, N=n, D=d, DV=dv, UNIT=unit, **tiles.constants(),
        DROP=bucket(rows.max_drop) if programmed and rows.drop is not None else 0,
        RANDOM=programmed and rows.random_ratio >= 0, NMS=programmed and rows.threshold >= 0,
        RENORM=rows.renormalize if programmed else 0, FINAL=rows.capture_final, MEAN=mean,
        PRECISION=gpu.precision(query.device), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if tiles.registers is not None and gpu.bounds_registers(query.device):
        options["maxnreg"] = tiles.registers
    return groups * b * (1 if mean else h), arguments, options


def rows_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    rows: RowPlan,
    out: Tensor,
    maps: Tensor | None,
    bits: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The tensors that `rows_kernel` takes, in order."""
    n, captured = key.shape[2], rows.capture_tokens
    slots = None if captured is None else rows.derive("slots", captured, lambda tokens: map_slots(tokens, n))
    check_contiguous(maps, bits, rows.content, rows.gate, rows.phrases, rows.drop, rows.seed, rows.head_mode, captured)
    if rows.content is None or rows.max_content == 0:
        return query, key, value, bias, out, maps, bits, *(None,) * 6, rows.head_mode, slots
    # Columns are permuted where those of the content do not fill the only tile.
    order = rows.derive("order", rows.content, content_first) if n > next_power_of_2(rows.max_content) else None
    return (
        query, key, value, bias, out, maps, bits, order, rows.content, rows.gate, rows.phrases, rows.drop, rows.seed,
        rows.head_mode, slots,
    )  # fmt: skip
