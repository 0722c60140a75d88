"""The CPU backend: `csrc/cpu` through the compiled core, on torch's own OpenMP threads.

The core takes addresses and strides; this file checks what it can serve, allocates the results and hands tensors over.
AVX-512 (with bfloat16 dot products where the machine has them), AVX2 or plain vectors: chosen at run time, or by the
environment variable SDATTN_FAST_ISA.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plan import PicturePlan, Plan, RowPlan
from ..reference import gaussian_kernel
from .gradients import Gradients, incoming
from .layout import address, row_program, row_strided, strided, with_rows
from .limits import beyond_limits, full_bias, no_picture_gradients
from .results import empty_bits, empty_maps, empty_results

__all__ = [
    "availability", "not_supported_reasons", "attention", "picture_attention", "pack", "PackedKeyValue", "smooth",
    "gaussian_attention", "info", "set_isa",
]  # fmt: skip

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def _load() -> tuple[Any, str | None]:
    # After torch, whose libgomp.so.1 and threads it then shares.
    try:
        from .. import _core  # type: ignore[attr-defined]
    except ImportError as error:
        mend = "install sdattn-fast where there is a C++17 compiler (GCC or Clang)"
        return None, f"the compiled core is missing ({error}); {mend}"
    wanted = os.environ.get("SDATTN_FAST_ISA")
    if wanted and not _core.cpu_set_isa(wanted):
        have = _core.cpu_info()["isas"]
        return None, f"SDATTN_FAST_ISA={wanted!r} is not available on this machine, which has: {have}"
    return _core, None


_core, _why_not = _load()


def availability(device: torch.device | None = None) -> str | None:
    """None where the compiled core is there and runs on this machine, else the reason and how to mend it."""
    return _why_not


def not_supported_reasons(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, plan: Plan, needs_grad: bool
) -> list[str]:
    """What of this call the CPU kernel does not serve; looks at shapes, dtypes and devices alone."""
    return beyond_limits(query, key, value, bias, "cpu", _DTYPES) + no_picture_gradients(plan, needs_grad)


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
    """Steps 1 to 6 and 8 for every row, in one pass.

    keep_layout: where the heads of a pixel lie side by side in the query, as after `view(B, M, H, D).transpose(1, 2)`,
    they do so in out, so that the way back is a view; otherwise, and by default, out is contiguous.

    Returns:
        out (B, H, M, Dv) in the value's dtype; maps, float32, (B, T, M) or (B, H, T, M), None without capture; bits,
        int32 (B, H, M, ceil(N / 32)), None unless asked: bit n % 32 of word n // 32 says that entry n survived steps
        4 and 5.
    """
    out, maps = empty_results(query, value, rows, keep_layout)
    bits = empty_bits(query, key.shape[2]) if return_bits else None
    _call(query, key, value, bias, scale, rows, out, maps, bits)
    return out, maps, bits


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

    Memory beside the results: a thread has the map of one head, (M + 47) * N floats at most; with one round never more
    than 4 MiB of it.

    Returns: out and maps, as `attention`.
    """
    out, maps = empty_results(query, value, rows, keep_layout)
    m = query.shape[2]
    weights = _gaussian(picture.sigma) if picture.sigma > 0 else None
    height, width = (0, 0) if grid is None else grid
    over = (
        picture.steps,
        picture.dropped(m),
        picture.nms,
        address(picture.active),
        height,
        width,
        address(weights),
        0 if weights is None else weights.numel() // 2,
    )
    _call(query, key, value, bias, scale, rows, out, maps, None, picture=over)
    return out, maps


@dataclass(frozen=True)
class PackedKeyValue:
    """Keys (B, H, N, D) and values (B, H, N, Dv) of one text, laid out for the kernel; made by `pack`."""

    data: Tensor  # uint8
    sizes: tuple[int, int, int, int, int]  # B, H, N, D, Dv
    dtype: torch.dtype
    isa: str

    def tensors(self) -> list[Tensor]:
        return [self.data]


def folded_refusal(x: Tensor, plan: Plan) -> str | None:
    """Why a folded layer on rows like x (B, M, C) is not served, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in _DTYPES:
        return f"the folded kernel takes float32 and bfloat16, not {x.dtype}"
    return None


def pack(key: Tensor, value: Tensor, rows: RowPlan, heads_there: list[int] | None = None) -> PackedKeyValue:
    """Lay out key (B, H, N, D) and value (B, H, N, Dv) for many calls of `folded` with this plan's content tokens.
    heads_there: which do not give zeros; the kernel sees that by itself."""
    b, h, n, d = key.shape
    sizes, dtype = (b, h, 0, n, d, value.shape[3]), _DTYPES[key.dtype]
    data = torch.empty(_core.cpu_packed_bytes(sizes, dtype) + 64, dtype=torch.uint8)
    data = data[-data.data_ptr() % 64 :]
    key, value = with_rows(key), with_rows(value)
    threads = torch.get_num_threads()
    _core.cpu_pack(sizes, dtype, row_strided(key), row_strided(value), address(rows.content), address(data), threads)
    return PackedKeyValue(data, (b, h, n, d, value.shape[3]), key.dtype, _core.cpu_info()["isa"])


def folded(
    x: Tensor,
    packed: PackedKeyValue,
    summed: bool,
    bias: Tensor | None,
    out_bias: Tensor | None,
    scale: float,
    rows: RowPlan,
) -> tuple[Tensor, Tensor | None]:
    """A folded layer: attention in which all heads share one query, or add to one output, or both.

    Args:
        x: (B, M, D), one query for all heads, or (B, H, M, D).
        packed: keys and values whose D and Dv are what x and the output have.
        summed: the output is the sum over the heads.
        bias: broadcasts to (B, H, M, N), added to the logits.
        out_bias: (Dv,) float32, added to the sum over the heads.

    Returns:
        y (B, M, Dv) if summed, else (B, H, M, Dv) with a pixel's heads side by side, and maps as `attention`.

    Raises: ValueError where the instruction set is another one than when it was packed.
    """
    b, h, _, d, dv = packed.sizes
    if packed.isa != _core.cpu_info()["isa"]:
        raise ValueError(f"packed: laid out for {packed.isa}, and the instruction set is now {_core.cpu_info()['isa']}")
    m = x.shape[-2]
    x = with_rows(x)
    out_bias = None if out_bias is None else out_bias.contiguous()
    # Not expand, which leaves a stride to a single head: here a stride of 0 is what says "shared".
    query = x.as_strided((b, h, m, d), (x.stride(0), 0, x.stride(1), 1)) if x.dim() == 3 else x
    if summed:
        y = torch.empty((b, m, dv), dtype=x.dtype)
        out = y.as_strided((b, h, m, dv), (m * dv, 0, dv, 1))
    else:
        y = out = torch.empty((b, m, h, dv), dtype=x.dtype).transpose(1, 2)
    maps = empty_maps(x, h, rows)
    _call(query, packed, packed, bias, scale, rows, out, maps, None, out_bias)
    return y, maps


def _call(query, key, value, bias, scale, rows, out, maps, bits, out_bias=None, picture=()) -> None:
    b, h, m, d = query.shape
    packed = key if isinstance(key, PackedKeyValue) else None
    n, dv = (packed.sizes[2], packed.sizes[4]) if packed else (key.shape[2], value.shape[3])
    bias = full_bias(bias, b, h, m, n, dtypes=_DTYPES)
    _core.cpu_attention(
        (b, h, m, n, d, dv),
        _DTYPES[query.dtype],
        scale,
        row_strided(query),
        row_strided(None if packed else key),
        row_strided(None if packed else value),
        row_strided(out),
        strided(bias),
        0 if bias is None else _DTYPES[bias.dtype],
        address(maps),
        address(bits),
        row_program(rows, rows.content),
        0 if packed is None else address(packed.data),
        address(out_bias),
        picture,
        torch.get_num_threads(),
    )


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
    """Gradients of `attention`. The same numbers whatever the threads: sums over rows go chunk by chunk, in order.

    Args:
        grad_out: (B, H, M, Dv), of the query's dtype; grad_maps: as the maps, float32. None: zeros.
        query, key, value, bias, scale, rows: what `attention` was called with; bias of four dimensions.
        bits: what `attention` returned, where the program decides anything.
        wanted: whether the gradients of query, key, value, bias and gate are wanted, and the relevance.
        relevance_tokens: (T,) int32; relevance_heads: (H,) uint8, None for all.

    Returns:
        The gradients of query, key, value, bias and gate, each like what it is of, and the relevance (B, T, M) float32,
        the sum over heads of A * max(dL/dA, 0); None for what is not wanted.
    """
    b, h, m, d = query.shape
    n, dv = key.shape[2], value.shape[3]
    grads = Gradients.empty(query, key, value, bias, rows.gate, wanted, relevance_tokens)
    if 0 in (b, h, m, n):
        grads.zero()
        return grads.results(bias, rows)
    grad_out, grad_maps = incoming(grad_out, grad_maps, query, value)
    expanded = full_bias(bias, b, h, m, n, dtypes=_DTYPES)
    _core.cpu_backward(
        (b, h, m, n, d, dv),
        _DTYPES[query.dtype],
        scale,
        row_strided(query),
        row_strided(key),
        row_strided(value),
        strided(expanded),
        0 if expanded is None else _DTYPES[expanded.dtype],
        address(bits),
        row_program(rows, rows.content),
        row_strided(grad_out),
        address(grad_maps),
        (
            row_strided(grads.query),
            row_strided(grads.key),
            row_strided(grads.value),
            address(grads.gate),
            address(grads.tokens),
            strided(None if grads.bias is None else grads.bias.expand(b, h, m, n)),
        ),
        (
            address(grads.relevance),
            address(relevance_tokens),
            0 if grads.relevance is None else grads.relevance.shape[1],
            address(relevance_heads),
        ),
        torch.get_num_threads(),
    )
    return grads.results(bias, rows)


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None) -> Tensor:
    """A new tensor: x (B, H, height * width, C) convolved `times` times with the Gaussian over the grid where the bool
    `where` (B, H) says so (None: everywhere), copied elsewhere. Radius and edges of `scipy.ndimage.gaussian_filter`."""
    b, h, _, c = x.shape
    kept, x = x.dtype, x if x.dtype in _DTYPES else x.to(torch.float32)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    weights = _gaussian(sigma)
    if where is not None:
        where = where.to(torch.uint8).expand(b, h).contiguous()
    _core.cpu_smooth(
        (b, h, grid[0], grid[1], c),
        _DTYPES[x.dtype],
        address(x),
        address(out),
        address(where),
        address(weights),
        weights.numel() // 2,
        times,
        torch.get_num_threads(),
    )
    return out.to(kept)


@functools.lru_cache(maxsize=64)
def _gaussian(sigma: float) -> Tensor:
    return gaussian_kernel(sigma, dtype=torch.float32)


def gaussian_attention(features: Tensor, values: Tensor, cutoff: float) -> Tensor:
    """(P, L) float32: the sums over j of exp(-|f_i - f_j|^2 / 2) values_j, for features (P, d <= 8) and values (P, L),
    both float32. Pairs whose squared distance is above the cutoff may be left out: order pixels by their features."""
    features = (features * math.sqrt(0.5 * math.log2(math.e))).contiguous()
    values = values.contiguous()
    out = torch.empty_like(values)
    _core.cpu_gaussian_attention(
        (*features.shape, values.shape[1]),
        address(features),
        address(values),
        address(out),
        0.5 * math.log2(math.e) * cutoff,
        torch.get_num_threads(),
    )
    return out


def info() -> dict[str, object]:
    """The instruction set in use ("isa"), those that this machine runs ("isas"), whether OpenMP is in ("openmp"), the
    compiler; empty where the core is missing."""
    if _core is None:
        return {}
    known = _core.cpu_info()
    return {**known, "isas": known["isas"].split()}


def set_isa(name: str) -> None:
    """Take another instruction set from now on, for tests and measurements. ValueError where it is not available."""
    if _core is None or not _core.cpu_set_isa(name):
        raise ValueError(f"name: expected one of {info().get('isas', [])}, got {name!r}")
