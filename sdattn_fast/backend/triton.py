"""The Triton backend: NVIDIA GPUs from Ampere on, AMD's; CPU tensors under TRITON_INTERPRET=1, for tests.

The kernels (sdattn_fast.kernels) see pointers, sizes and strides. This file checks what they serve, allocates, chooses
tiles and launches. Nothing is tuned at run time: `_tiles` is a table in the shape of a function.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..plan import PicturePlan, Plan, RowPlan
from ..streams import to_device
from .devices import gpu_index, on_device
from .layout import check_contiguous, check_rows, has_rows, with_rows
from .results import empty_bits, empty_results, heads_added_up_after, is_by_head, mean_of_heads
from .triton_launch import Bound, Call, launch, launch_bound, version

__all__ = [
    "availability", "remark", "not_supported_reasons", "attention", "backward", "BoundAttention", "folded", "pack",
    "picture_attention", "smooth", "gaussian_attention", "content_first", "interprets",
]  # fmt: skip

_MOST = 256  # N, D and Dv
_BLOCK = 1024  # rows whose probabilities exist at a time
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOVES = _QUERY, _OUT, _MAPS, _SEED = 0, 4, 5, 12  # among the tensors of `rows_tensors`, what is new at every call
_LOG2E = math.log2(math.e)
_OLDEST_TRITON = (3, 2)  # of torch 2.6
# What `make compile-matrix` compiles for, and where benchmarks/on_gpu.sh passed its tests (benchmarks/results).
COMPILED_FOR = (
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201",
)  # fmt: skip
RUN_ON: tuple[str, ...] = ("sm_90",)


def availability(device: torch.device | None = None) -> str | None:
    """None where the kernels can run on a device, torch's current one by default, else the reason and how to fix it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (torch's CUDA wheels for Linux bring it)"
    if interprets():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    if version() < _OLDEST_TRITON:
        return f"triton {'.'.join(map(str, version()))} is older than 3.2, the oldest that the kernels compile with"
    return _refusal_of_device(gpu_index(device))


def remark(device: torch.device | None = None) -> str | None:
    """What is to be known of these kernels on a device where they are available, or None."""
    if interprets():
        return None
    architecture = _architecture(gpu_index(device))
    if architecture in RUN_ON:
        return None
    tested = "compiled in the tests" if architecture in COMPILED_FOR else "not even compiled in the tests"
    return f"for {architecture} the kernels are {tested} but not yet run: compare with backend='reference' first"


@functools.cache
def _refusal_of_device(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0, the least the kernels want"
    return None


def _architecture(index: int) -> str:
    """ "sm_90" or "gfx942", of one device: cards in a machine may differ, and so do the slices of one card."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def not_supported_reasons(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, plan: Plan, needs_grad: bool
) -> list[str]:
    """What of this call the kernels do not serve; looks at shapes, strides, dtypes and devices alone."""
    reasons = []
    kind = "cpu" if interprets() else "cuda"
    for name, x in (("query", query), ("key", key), ("value", value), ("bias", bias)):
        if x is None:
            continue
        if x.device.type != kind:
            reasons.append(f"{name} is on {x.device}, not on a {kind} device")
        elif x.device != query.device:
            reasons.append(f"{name} is on {x.device} and query on {query.device}")
        if name == "bias":
            continue
        if x.dtype not in _DTYPES:
            reasons.append(f"{name} is {x.dtype}, not float32, float16 or bfloat16")
        elif x.dtype != query.dtype:
            reasons.append(f"{name} is {x.dtype} and query {query.dtype}")
        elif x.dtype == torch.bfloat16 and kind == "cpu":
            reasons.append(f"{name} is bfloat16, whose products Triton's interpreter computes wrongly (triton #11584)")
        if not has_rows(x):
            reasons.append(f"{name}'s last dimension is not contiguous")
    if key.shape[2] > _MOST:
        reasons.append(f"{key.shape[2]} tokens, more than {_MOST}")
    if query.shape[3] > _MOST or value.shape[3] > _MOST:
        reasons.append(f"head dimension {max(query.shape[3], value.shape[3])}, more than {_MOST}")
    if needs_grad and plan.picture is not None:
        reasons.append("gradients are asked for of a program that looks over the picture, which has no backward kernel")
    return reasons


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
    """Steps 1 to 6 and 8 for every row, in one launch.

    keep_layout: where the heads of a pixel lie side by side in the query, as after `view(B, M, H, D).transpose(1, 2)`,
    they do so in out, so that the way back is a view; otherwise, and by default, out is contiguous.

    Returns:
        out (B, H, M, Dv) in the value's dtype; maps, float32, (B, T, M) or (B, H, T, M), None without capture; bits,
        int32 (B, H, M, ceil(N / 32)), None unless asked: bit n % 32 of word n // 32 says that entry n survived steps 4
        and 5.
    """
    b, h, m, _ = query.shape
    n = key.shape[2]
    out, maps = empty_results(query, value, rows, keep_layout)
    bits = empty_bits(query, n) if return_bits else None
    if b * h * m == 0 or n == 0:
        # No row, or rows over no token: what there is of the results is zero.
        return out.zero_(), None if maps is None else maps.zero_(), bits
    bias = _full_bias(bias, b, h, m, n)
    _launch_rows(rows_tensors(query, key, value, bias, rows, out, maps, bits), scale, rows)
    return out, maps, bits


class BoundAttention:
    """`attention`, with out as the query lies, for queries and seeds that differ from the first ones in their numbers
    and addresses alone; the other tensors are kept."""

    def __init__(self, key: Tensor, value: Tensor, scale: float, rows: RowPlan) -> None:
        self._call = key, value, scale, rows
        self._by_head: BoundAttention | None = None
        # The launch, the first call's addresses, the tensors that stay. Replaced as a whole: threads may be reading.
        self._kept: tuple[Bound, list[int | None], tuple[Tensor | None, ...]] | None = None

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
            launch, first, _ = kept
            now = first.copy()
            now[_QUERY], now[_OUT] = query.data_ptr(), out.data_ptr()
            if maps is not None:
                now[_MAPS] = maps.data_ptr()
            if seed is not None:
                now[_SEED] = seed.data_ptr()
            # The kernel was compiled for how these lie.
            if all((now[i] or 0) % 16 == (first[i] or 0) % 16 for i in _MOVES):
                with on_device(query.device):
                    launch(now)
                return out, maps
        if out.numel() == 0 or key.shape[2] == 0:
            return out.zero_(), None if maps is None else maps.zero_()
        rows = rows if seed is None else rows.with_seed(seed)
        tensors = rows_tensors(query, key, value, None, rows, out, maps, None)
        bound = _launch_rows(tensors, scale, rows)
        if bound is not None:
            stay = tuple(None if i in _MOVES else x for i, x in enumerate(tensors))
            self._kept = bound, [None if x is None else x.data_ptr() for x in tensors], stay
        return out, maps


def _launch_rows(tensors: tuple[Tensor | None, ...], scale: float, rows: RowPlan) -> Bound | None:
    from ..kernels import rows_kernel

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
        return launch_bound(
            rows_kernel, tensors, like, lambda: rows_call(query, key, value, bias, scale, rows, out, maps, bits)
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
    """Gradients of `attention`, the same numbers every time on the same device; `triton_backward.gradients` has them.

    Args:
        grad_out: (B, H, M, Dv); grad_maps: as the maps, float32. None: zeros.
        query, key, value, bias, scale, rows: what `attention` was called with; bias of four dimensions.
        bits: what `attention` returned, where the program decides anything.
        wanted: whether the gradients of query, key, value, bias and gate are wanted, and the relevance.
        relevance_tokens: (T,) int32; relevance_heads: (H,) uint8, None for all.

    Returns:
        The gradients of query, key, value, bias and gate, each like what it is of, and the relevance (B, T, M) float32,
        the sum over heads of A * max(dL/dA, 0); None for what is not wanted.
    """
    from .triton_backward import gradients

    return gradients(
        grad_out, grad_maps, query, key, value, bias, scale, rows, bits, wanted, relevance_tokens, relevance_heads
    )


@dataclass(frozen=True)
class Packed:
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
    kind = "cpu" if interprets() else "cuda"
    if x.device.type != kind:
        return f"x is on {x.device}, not on a {kind} device"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the folded kernel takes float16 and bfloat16, not {x.dtype}: what lies between its halves is half"
    if x.dtype == torch.bfloat16 and kind == "cpu":
        return "x is bfloat16, whose products Triton's interpreter computes wrongly (triton #11584)"
    if plan.rows.capture_tokens is not None:
        return "maps are captured, which the folded kernel does not do"
    return None


def pack(key: Tensor, value: Tensor, rows: RowPlan, heads_there: list[int] | None = None) -> Packed:
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
    return Packed(key, value, None if heads is None else heads.to(torch.int32), (b, h, n, d, dv))


def folded(
    x: Tensor,
    packed: Packed,
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
    from ..kernels import folded_kernel

    with on_device(x.device):
        for first in range(0, m, _BLOCK):
            end = min(first + _BLOCK, m)
            p = torch.empty(_block_shape(packed, summed, end - first), dtype=x.dtype, device=x.device)
            programs, arguments, options = folded_call(x, packed, bias, scale, rows, p, first, end, summed)
            launch(folded_kernel, programs, arguments, options)
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


def _block_shape(packed: Packed, summed: bool, rows: int) -> tuple[int, ...]:
    """Of the probabilities: a pixel's heads side by side where they are summed, else a head's pixels."""
    b, heads, columns, _ = packed.key.shape
    return (b, rows, heads, columns) if summed else (b, heads, rows, columns)


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
        out.zero_()
        maps = None if maps is None else maps.zero_()
        return out, mean_of_heads(maps, rows) if maps is not None and rows.capture_mean else maps
    content = rows.content
    assert content is not None

    drop = math.floor(picture.drop_ratio * m + 1e-9) if picture.drop_ratio >= 0 else 0
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
    from ..kernels import picture_kernel

    with on_device(query.device):
        programs, arguments, options = picture_call(
            query, key, value, bias, scale, rows, picture, out, maps, histogram, found, highest, stage, p, mass, **how
        )
        launch(picture_kernel, programs, arguments, options)


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
    na = _power(n)
    # All columns in one tile: 32 rows of 128 are 32 registers a thread, and float32 products take as many again.
    bm = 16 if na > 128 or query.element_size() == 4 else 32
    groups = -(-m // bm)
    gate, captured = rows.gate, rows.capture_tokens
    slots = None if captured is None else rows.derive("slots", captured, lambda tokens: map_slots(tokens, n))
    bias = _full_bias(bias, b, h, m, n)
    check_contiguous(
        maps, p, mass, rows.content, gate, rows.phrases, rows.drop, rows.seed, rows.head_mode, picture.active
    )
    arguments = (
        query, key, value, bias, out, p, mass, maps, rows.content, gate, rows.phrases, rows.drop, rows.seed,
        rows.head_mode, picture.active, slots, histogram, found, highest,
        float(scale) * _LOG2E, float(rows.random_ratio), float(rows.threshold),
        *row_strides_of(query, key, value, out),
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        0 if gate is None else gate.stride(0), 0 if gate is None or gate.shape[1] == 1 else n,
        m, 0 if maps is None else maps.shape[2], groups, _STAGES[stage], shift, bits,
    )  # fmt: skip
    options = dict(
        H=h, N=n, D=d, DV=dv, NA=na, DA=min(32, _power(d)), VA=min(32, _power(dv)), BM=bm,
        STAGE="anew" if p is None else stage, FIRST=first,
        DROP=_bucket(rows.max_drop) if rows.drop is not None else 0,
        RANDOM=rows.random_ratio >= 0, NMS=0 if rows.threshold < 0 else 2 if picture.nms else 1,
        RENORM=rows.renormalize, FINAL=rows.capture_final, PRECISION=_precision(query.device),
        num_warps=8 if na > 128 else 4, num_stages=2,
    )  # fmt: skip
    return groups * b * h, arguments, options


def gaussian_attention(features: Tensor, values: Tensor) -> Tensor:
    """(P, L) float32: the sums over j of exp(-|f_i - f_j|^2 / 2) values_j, for features (P, d <= 8) and values (P, L),
    both float32."""
    from ..kernels import gaussian_kernel

    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    if values.numel() == 0:
        return out
    with on_device(features.device):
        programs, arguments, options = gaussian_call(features, values, out)
        launch(gaussian_kernel, programs, arguments, options)
    return out


def gaussian_call(features: Tensor, values: Tensor, out: Tensor) -> Call:
    """How `gaussian_kernel` is called."""
    pixels, labels = values.shape
    # Triton 3.2 never ends on this kernel's products in three TF32 parts, and 3.3 refuses them.
    precision = "ieee" if version() < (3, 4) else _precision(features.device)
    arguments = ((features * math.sqrt(0.5 * _LOG2E)).contiguous(), values.contiguous(), out, pixels)
    options = dict(
        D=features.shape[1], L=labels, BL=_power(labels), BM=64, BN=64, PRECISION=precision,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return -(-pixels // 64), arguments, options


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None) -> Tensor:
    """A new tensor: x (B, H, height * width, C) convolved `times` times with the Gaussian over the grid where `where`,
    a (B, H) bool, says so (None: everywhere), else copied. `scipy.ndimage.gaussian_filter`'s radius and edges."""
    b, h = x.shape[:2]
    kept = x.dtype
    if x.numel() == 0 or times == 0 or _radius(sigma) == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if where is not None:
        where = where.to(torch.uint8).expand(b, h).contiguous()
    from ..kernels import smooth_kernel

    with on_device(x.device):
        for i in range(2 * times):
            y = torch.empty(x.shape, dtype=torch.float32 if i + 1 < 2 * times else kept, device=x.device)
            down = i % 2 == 0
            launch_bound(
                smooth_kernel,
                (x, y, where),
                (x.dtype, y.dtype, x.shape, x.stride(), grid, sigma, down),
                lambda x=x, y=y, down=down: smooth_call(x, y, where, grid, sigma, down),  # type: ignore[misc]
            )
            x = y
    return x


def smooth_call(x: Tensor, y: Tensor, where: Tensor | None, grid: tuple[int, int], sigma: float, down: bool) -> Call:
    """How `smooth_kernel` is called for a pass along the height (down) or the width."""
    b, h, m, c = x.shape
    channels = min(128, _power(c))
    pixels = 1024 // channels
    blocks = -(-m // pixels)
    unit, strides = in_units(*strides_of(x))
    radius = _radius(sigma)
    options = dict(
        C=c, RADIUS=radius, DOWN=down, NEAR=radius <= grid[0 if down else 1], BP=pixels, BC=channels, UNIT=unit,
        num_warps=4,
    )  # fmt: skip
    arguments = (x, y, where, float(sigma), *grid, *strides, x.stride(3), h, blocks)
    return blocks * -(-c // channels) * b * h, arguments, options


def content_first(content: Tensor) -> Tensor:
    """(B, N) int32: each entry's tokens, the content ones first, else in their order. content is (B, N), 0 or 1."""
    return torch.argsort(content, dim=1, descending=True, stable=True).to(torch.int32)


def map_slots(tokens: Tensor, count: int) -> Tensor:
    """(count,) int32: where among the captured maps a token's is, -1 for tokens that are not captured."""
    slots = torch.full((count,), -1, dtype=torch.int32, device=tokens.device)
    slots[tokens.long()] = torch.arange(tokens.shape[0], dtype=torch.int32, device=tokens.device)
    return slots


@dataclass(frozen=True)
class Tiles:
    """The constants of a launch. NA, NB: columns of the two tiles; DA, DB, VA, VB: slices of head dimension and value
    dimension; BM: rows; TILES: tiles of rows that one program walks over; STREAM: keys and values do not stay.
    registers: that a thread may have at most, on NVIDIA's; None: as the compiler likes."""

    NA: int
    NB: int
    DA: int
    DB: int
    VA: int
    VB: int
    BM: int
    TILES: int
    STREAM: bool
    num_warps: int
    num_stages: int
    registers: int | None

    def constants(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("NA", "NB", "DA", "DB", "VA", "VB", "BM", "TILES", "STREAM")}


@functools.cache
def choose_tiles(
    n: int,
    d: int,
    dv: int,
    size: int,
    most_content: int | None,
    pixels: int,
    heads: int,
    processors: int,
    mean: bool,
    lean: bool = False,
) -> Tiles:
    """Tiles for n tokens, head dimensions d and dv of `size` bytes a number. most_content: None for plain attention;
    heads: B * H, processors: of the device; mean: one program walks over all heads; lean: no bias, maps and bits."""
    na, nb = _split(n)
    if most_content is not None:
        na = min(_power(most_content), _power(n))
        nb = _power(n - na) if n > na else 0
    da, db = _split(d)
    va, vb = _split(dv)
    wide = na + nb > 160  # columns that four warps cannot hold
    # Float32 is split in three for the tensor cores, which leaves no room in registers either.
    stream = size == 4 or na >= 128 or wide or da + db + va + vb > 192
    bm, stages = (32 if wide or size == 4 else 64), 1
    if stream:
        slice_ = 16 if wide and size == 4 else 32
        da, db, va, vb = min(slice_, _power(d)), 0, min(slice_, _power(dv)), 0
        bm, stages = (16, 1) if wide and size == 4 else (bm, 2 if wide or size == 4 else 3)
    if bm == 64 and -(-pixels // bm) * heads < processors:
        bm = 32
    # Without a bound the compiler takes some registers more, and a program less fits a multiprocessor. These spill
    # nothing, or 8 bytes; with a bias, maps or bits it would be hundreds.
    registers = None
    if lean and most_content is not None and bm == 64 and not (stream or wide):
        registers, resident = (128, 4) if na <= 32 else (168, 3)
    # A program walks as far as leaves every multiprocessor three programs.
    tiles, walks = -(-pixels // bm), [1]
    if not (mean or stream):
        walks += [w for w in (2, 4, 8) if w <= tiles and tiles // w * heads >= 3 * processors]
    if registers is not None and processors:
        # Nor further than lets the last round of programs, which takes as long as a full one, begin in time.
        rounds = {w: -(-(-(-tiles // w) * heads) // (resident * processors)) * w for w in walks}
        walks = [w for w in walks if rounds[w] == min(rounds.values())]
    walk = walks[-1]
    return Tiles(na, nb, da, db, va, vb, bm, walk, stream, 8 if wide else 4, 2 if walk > 1 else stages, registers)


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
    tiles = choose_tiles(n, d, dv, query.element_size(), most, m, b * h, _processors(query.device), mean, lean)
    gate = rows.gate if programmed else None
    groups = -(-m // (tiles.BM * (1 if mean else tiles.TILES)))
    unit, strides = in_units(*row_strides_of(query, key, value, out))
    bias = _full_bias(bias, b, h, m, n)
    arguments = (
        *rows_tensors(query, key, value, bias, rows, out, maps, bits),
        float(scale) * _LOG2E, float(rows.random_ratio), float(rows.threshold),
        *strides, *((0, 0, 0, 0) if bias is None else bias.stride()),
        0 if gate is None else gate.stride(0), 0 if gate is None or gate.shape[1] == 1 else n,
        m, 0 if maps is None else maps.shape[-2], groups,
    )  # fmt: skip
    options = dict(
        H=h, N=n, D=d, DV=dv, UNIT=unit, **tiles.constants(),
        DROP=_bucket(rows.max_drop) if programmed and rows.drop is not None else 0,
        RANDOM=programmed and rows.random_ratio >= 0, NMS=programmed and rows.threshold >= 0,
        RENORM=rows.renormalize if programmed else 0, FINAL=rows.capture_final, MEAN=mean,
        PRECISION=_precision(query.device), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if tiles.registers is not None and _bounds_registers(query.device):
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
    order = rows.derive("order", rows.content, content_first) if n > _power(rows.max_content) else None
    return (
        query, key, value, bias, out, maps, bits, order, rows.content, rows.gate, rows.phrases, rows.drop, rows.seed,
        rows.head_mode, slots,
    )  # fmt: skip


def _full_bias(bias: Tensor | None, *shape: int) -> Tensor | None:
    if bias is None:
        return None
    return (bias if bias.dtype in _DTYPES else bias.to(torch.float32)).expand(shape)


def folded_call(
    x: Tensor,
    packed: Packed,
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
        n, d, 16, 2, rows.max_content if programmed else None, end - first, b * heads, _processors(x.device), False
    )
    # The columns are permuted wherever there are token classes, since `pack` cannot know more than that.
    order = None if rows.content is None else rows.derive("order", rows.content, content_first)
    gate = rows.gate if programmed else None
    bias = _full_bias(bias, b, h, x.shape[-2], n)
    groups = -(-(end - first) // tiles.BM)
    check_contiguous(packed.key, content, gate, rows.phrases, rows.drop, rows.seed, rows.head_mode, packed.heads)
    x_b, x_h, x_m = row_strides_of(x[:, None] if x.dim() == 3 else x)
    p_b, p_h, p_m = (p.stride(0), p.stride(2), p.stride(1)) if summed else p.stride()[:3]
    unit, strides = in_units(x_b, x_h, x_m, *row_strides_of(packed.key))
    arguments = (
        x, packed.key, bias, p, order, content, gate, rows.phrases if programmed else None,
        rows.drop if programmed else None, rows.seed if programmed else None, rows.head_mode, packed.heads,
        float(scale) * _LOG2E, float(rows.random_ratio), float(rows.threshold),
        *strides, p_b, p_h, p_m, *((0, 0, 0, 0) if bias is None else bias.stride()),
        0 if gate is None else gate.stride(0), 0 if gate is None or gate.shape[1] == 1 else n,
        first, end, groups,
    )  # fmt: skip
    options = dict(
        HEADS=heads, N=n, D=d, NA=tiles.NA, NB=tiles.NB, NP=columns, DA=min(64, _power(d)), BM=tiles.BM, UNIT=unit,
        DROP=_bucket(rows.max_drop) if programmed and rows.drop is not None else 0,
        RANDOM=programmed and rows.random_ratio >= 0, NMS=programmed and rows.threshold >= 0,
        RENORM=rows.renormalize if programmed else 0, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return groups * b * heads, arguments, options


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """The first three strides of x (B, H, M, D), 0 for a dimension of size 1, whose stride says nothing and may be
    anything: an odd one would keep the compiler from wide loads."""
    b, h, m = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return b, h, m


def row_strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """`strides_of` of each. Raises: ValueError where a last dimension, whose stride kernels do not take, is not
    contiguous."""
    check_rows(*tensors)
    return tuple(stride for x in tensors for stride in strides_of(x))


def in_units(*strides: int) -> tuple[int, tuple[int, ...]]:
    """(unit, strides / unit): the largest of 8, 4, 2 and 1 that divides them all.

    The kernels multiply the two again, in 32 bits where the stride in units fits, so a stride beyond that is passed as
    it is, which makes it a 64-bit argument.
    """
    if any(s >= 2**31 for s in strides):
        return 1, strides
    unit = next(u for u in (8, 4, 2, 1) if all(s % u == 0 for s in strides))
    return unit, tuple(s // unit for s in strides)


def _bucket(most: int) -> int:
    """The bound on k that the kernel is compiled for: 0, 1, 2, 4, 8, or 256 for any k."""
    return next(bound for bound in (0, 1, 2, 4, 8, _MOST) if most <= bound)


def _precision(device: torch.device) -> str:
    """Of products of float32: three TF32 products, as good as float32, where there is no float32 tensor core."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def _radius(sigma: float) -> int:
    return int(4.0 * sigma + 0.5)


def _power(size: int) -> int:
    """The tile that holds size: a power of two, at least 16, as tensor cores want."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def _split(size: int) -> tuple[int, int]:
    """Two powers of two that hold size with less waste than one would: 77 = 64 + 16, 40 = 32 + 16; (whole, 0) else."""
    whole = _power(size)
    low = whole // 2
    if low < 16 or size <= low:
        return whole, 0
    rest = _power(size - low)
    return (low, rest) if low + rest < whole else (whole, 0)


def _processors(device: torch.device) -> int:
    return _count_processors(gpu_index(device)) if device.type == "cuda" else 2


def _bounds_registers(device: torch.device) -> bool:
    """Whether a kernel's registers are bounded: on sm_80 to sm_90. It was measured to pay on an H200; what is compiled
    for sm_100 and sm_120 would have 56 to 80 bytes of each thread in memory."""
    return device.type == "cuda" and torch.version.hip is None and _capability(gpu_index(device)) < (10, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _count_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def interprets() -> bool:
    """Whether kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
