"""Folding a layer's projections into the text: `to_q` into the keys, `to_out` into the values, by cost.

    logits_h = (x Wq_h) K_h^T = x (K_h Wq_h^T)^T        keys N x C a head instead of N x D
    y = sum_h (P_h V_h) Wo_h + b = sum_h P_h (V_h Wo_h) + b        values N x C a head instead of N x D

The folded keys and values are made once per prompt and kept with it, so that one kernel goes from x to y. That saves
two projections of 2 C^2 flops a row and costs 2 * 2 * H * N * C instead of 2 * 2 * N * C between them.

Source: docs/design.md, "Projections fold into keys and values"; the cost model is `seconds_of`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import folded_layer
from ..backend import cpu
from ..execute import Prepared
from ..folded_layer import FoldedText
from .text_cache import why_unread

__all__ = ["KINDS", "Shape", "choose_fold", "fold_refusal", "fold_text", "seconds_of", "shape_of"]

KINDS = ("none", "query", "out", "both")


@dataclass(frozen=True)
class Shape:
    """A layer and its call: batch, pixels, heads that are not zero, tokens, head dimension, channels in, of all heads
    (zero or not), and out."""

    batch: int
    pixels: int
    heads: int
    tokens: int
    head_dim: int
    channels_in: int
    inner: int
    channels_out: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Rates:
    """What a machine does: flops a second of torch's matrix products and of our kernel on all threads, bytes a second
    of what a product reads from beyond the caches, seconds of one call."""

    torch: float
    kernel: float
    memory: float
    call: float


# Only ratios decide, and they must not depend on a moment's load, so these are measured constants: `pytest --benchmark
# benchmarks/test_folded_layers.py` prints what they are made from. Two Zen 5 cores. Torch's float32 product, MKL, keeps
# its widest paths for Intel's processors; there no machine was at hand, and the two are taken to be equal.
_RATES = {
    ("amd", torch.float32): Rates(torch=195e9, kernel=450e9, memory=20e9, call=8e-6),
    ("amd", torch.bfloat16): Rates(torch=850e9, kernel=840e9, memory=20e9, call=8e-6),
    ("other", torch.float32): Rates(torch=450e9, kernel=450e9, memory=20e9, call=8e-6),
    ("other", torch.bfloat16): Rates(torch=850e9, kernel=840e9, memory=20e9, call=8e-6),
}
_NARROW = 0.5  # the kernel's rate on AVX2, and a quarter of it on plain vectors


def choose_fold(shape: Shape, may_query: bool = True, may_out: bool = True) -> str:
    """The cheapest of KINDS by `seconds_of`, among those allowed."""
    allowed = [k for k in KINDS if (may_query or k not in ("query", "both")) and (may_out or k not in ("out", "both"))]
    return min(allowed, key=lambda kind: seconds_of(shape, kind))


def seconds_of(shape: Shape, kind: str) -> float:
    """What a call costs, text ready: products at their rates, the text's panels and the rows from memory, calls.

    Only what differs between kinds has to be right.
    """
    s, rates = shape, _rates(shape.dtype)
    rows, inner = s.batch * s.pixels, s.inner
    deep = s.channels_in if kind in ("query", "both") else s.head_dim
    wide = s.channels_out if kind in ("out", "both") else s.head_dim
    size = s.dtype.itemsize
    seconds = 2 * rows * s.heads * s.tokens * (deep + wide) / rates.kernel
    # Panels pass once a block of rows, from the caches where they fit; a pass costs what the outer cache gives.
    seconds += rates.call + s.batch * s.heads * s.tokens * (deep + wide) * size / rates.memory
    if deep == s.head_dim:
        seconds += rates.call + 2 * rows * s.channels_in * inner / rates.torch + 2 * rows * inner * size / rates.memory
    if wide == s.head_dim:
        seconds += rates.call + 2 * rows * inner * s.channels_out / rates.torch + 2 * rows * inner * size / rates.memory
    return seconds


def shape_of(attn: Any, key: Tensor, x: Tensor, prepared: Prepared) -> Shape:
    """The shape of a layer's call on x (B, M, C) with keys (B, H, N, D)."""
    not_zero = folded_layer.heads_not_zero(prepared)
    heads = key.shape[1] if not_zero is None else len(not_zero)
    return Shape(
        x.shape[0], x.shape[1], heads, key.shape[2], key.shape[3], int(attn.query_dim), key.shape[1] * key.shape[3],
        int(attn.out_dim), x.dtype,
    )  # fmt: skip


def fold_refusal(attn: Any, prepared: Prepared, x: Tensor) -> str | None:
    """Why a layer cannot be folded at all in this call, or None."""
    if getattr(attn, "norm_q", None) is not None:
        return "its queries are normalised, which is no linear step"
    for name, module in (("to_q", attn.to_q), ("to_out[0]", attn.to_out[0])):
        why = why_unread(module)
        if why is not None:
            return f"{name} {why}"
    return folded_layer.fold_refusal(prepared, x)


def fold_text(attn: Any, kind: str, key: Tensor, value: Tensor, prepared: Prepared) -> FoldedText:
    """Fold key and value (B, H, N, D) of a layer; kind is "query", "out" or "both".

    Adapters are in it; products are in float32. Raises: ValueError for projections that `fold_refusal` refuses.
    """
    heads, head_dim = key.shape[1], key.shape[3]
    inner = heads * head_dim
    dtype, scale = key.dtype, head_dim**-0.5 if attn.scale_qk else 1.0
    value = prepared.fold_value(value)
    token_bias = out_bias = None
    if kind in ("query", "both"):
        weight, bias = _affine(attn.to_q, attn.query_dim, key.device)
        if bias is not None:
            token_bias = scale * torch.einsum("bhnd,hd->bhn", key.float(), bias.view(heads, head_dim))[:, :, None, :]
        key = torch.einsum("bhnd,chd->bhnc", key.float(), weight.view(-1, heads, head_dim)).to(dtype)
    if kind in ("out", "both"):
        weight, out_bias = _affine(attn.to_out[0], inner, key.device)
        value = torch.einsum("bhnd,hdc->bhnc", value.float(), weight.view(heads, head_dim, -1)).to(dtype)
    return folded_layer.fold(
        prepared, key, value, kind in ("query", "both"), kind in ("out", "both"), scale, token_bias, out_bias
    )


def _affine(module: Any, width: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """x @ weight + bias of a linear module: weight (width, out), bias (out,), float32; bias None where there is none.

    Where it is more than a Linear, with an adapter around it, it runs on the unit vectors, its parameters widened and
    its bias out of the way, so that nothing is rounded beside it.
    """
    why = why_unread(module)
    if why is not None:
        raise ValueError(f"fold: cannot be served, because a projection {why}")
    if type(module) is nn.Linear:
        bias = None if module.bias is None else module.bias.detach().float()
        return module.weight.detach().float().t(), bias
    wide = {name: p.detach().float() for name, p in module.named_parameters()}
    no_bias = {name: torch.zeros_like(p) if name.endswith("bias") else p for name, p in wide.items()}
    with torch.no_grad():
        weight = functional_call(module, no_bias, torch.eye(width, device=device))
        bias = functional_call(module, wide, torch.zeros(1, width, device=device))[0]
    return weight, bias if any(name.endswith("bias") for name in wide) else None


def _rates(dtype: torch.dtype) -> Rates:
    info = cpu.info()
    vendor = "amd" if info.get("vendor") == "amd" else "other"
    rates = _RATES[vendor, dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32]
    isa = str(info.get("isa", ""))
    slower = 1.0 if isa.startswith("avx512") else _NARROW if isa == "avx2" else _NARROW / 4
    return Rates(rates.torch, rates.kernel * slower, rates.memory, rates.call)
