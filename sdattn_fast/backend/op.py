"""The fused backends as PyTorch custom ops, so that torch.compile takes them whole.

Eager code calls the backend modules directly: a custom op costs tens of microseconds a call, as much as a small layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from ..plan import PicturePlan, RowPlan
from . import fused

__all__ = ["attention", "picture_attention", "smooth", "NO_SECOND"]

NO_SECOND = (
    "sdattn_fast: the fused backends have no gradient of the gradient; backend='reference' has one (without "
    "create_graph=True, or with a single torch.func.grad, none is asked for)"
)

_ROWS_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, Tensor? content, Tensor? gate, "
    "Tensor? phrases, Tensor? drop, float random_ratio, Tensor? seed, float threshold, int renormalize, "
    "Tensor? head_mode, Tensor? capture_tokens, bool capture_final, bool capture_mean, SymInt max_content, "
    "SymInt max_drop, bool return_bits, Tensor? sink, Tensor? sink_tokens, Tensor? sink_heads, str backend) "
    "-> (Tensor, Tensor, Tensor)"
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
    relevance: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A fused backend's `attention` through the op ``sdattn_fast::rows``.

    Differentiable where return_bits is set or the program decides nothing. relevance: sink, tokens and heads as
    `autograd.Relevance`.
    """
    out, maps, bits = torch.ops.sdattn_fast.rows(
        query, key, value, bias, scale, rows.content, rows.gate, rows.phrases, rows.drop, rows.random_ratio, rows.seed,
        rows.threshold, rows.renormalize, rows.head_mode, rows.capture_tokens, rows.capture_final, rows.capture_mean,
        *_bounds(rows), return_bits, *relevance, backend,
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
        *_bounds(rows), picture.steps, picture.sigma, picture.drop_ratio, picture.nms, picture.active,
        height, width, backend,
    )  # fmt: skip
    return out, maps if rows.capture_tokens is not None else None


def _bounds(rows: RowPlan) -> tuple[int, int]:
    """max_content and max_drop."""
    return (rows.max_content, rows.max_drop) if rows.bounds is None else (rows.bounds.shape[0], rows.bounds.shape[1])


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None, backend: str) -> Tensor:
    """A fused backend's `smooth` through the op ``sdattn_fast::smooth``."""
    return torch.ops.sdattn_fast.smooth(x, grid[0], grid[1], sigma, times, where, backend)


@library.custom_op("sdattn_fast::rows", mutates_args=(), schema=_ROWS_SCHEMA)
def _rows(
    query, key, value, bias, scale, content, gate, phrases, drop, random_ratio, seed, threshold, renormalize, head_mode,
    capture_tokens, capture_final, capture_mean, max_content, max_drop, return_bits, sink, sink_tokens, sink_heads,
    backend,
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
    capture_tokens, capture_final, capture_mean, max_content, max_drop, return_bits, sink, sink_tokens, sink_heads,
    backend,
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


# What the gradients read, in the order of rows_backward's arguments.
_SAVED = (
    "query key value bias scale content gate phrases renormalize head_mode capture_tokens capture_final capture_mean "
    "max_content sink_tokens sink_heads backend"
).split()
_ROWS_ARGUMENTS = [argument.name for argument in torch.ops.sdattn_fast.rows.default._schema.arguments]
_DIFFERENTIABLE = ("query", "key", "value", "bias", "gate", "sink")


def _save(ctx, inputs, output):
    given = dict(zip(_ROWS_ARGUMENTS, inputs, strict=True))
    given = {name: given[name] for name in _SAVED}
    ctx.tensors = [name for name, x in given.items() if isinstance(x, Tensor)]
    ctx.others = {name: x for name, x in given.items() if not isinstance(x, Tensor)}
    ctx.save_for_backward(output[2], *(given[name] for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def _rows_gradients(ctx, grad_out, grad_maps, _):
    bits, *tensors = ctx.saved_tensors
    saved = {**ctx.others, **dict(zip(ctx.tensors, tensors, strict=True))}
    needs = dict(zip(_ROWS_ARGUMENTS, ctx.needs_input_grad, strict=True))
    wanted = [needs[name] for name in _DIFFERENTIABLE]
    if (grad_out is None and grad_maps is None) or not any(wanted):
        return (None,) * len(_ROWS_ARGUMENTS)
    grads = torch.ops.sdattn_fast.rows_backward(grad_out, grad_maps, bits, wanted, *(saved[name] for name in _SAVED))
    by_name = {name: grad for name, grad, want in zip(_DIFFERENTIABLE, grads, wanted, strict=True) if want}
    return tuple(by_name.get(name) for name in _ROWS_ARGUMENTS)


_rows.register_autograd(_rows_gradients, setup_context=_save)


@library.custom_op(
    "sdattn_fast::rows_backward",
    mutates_args=(),
    schema="(Tensor? grad_out, Tensor? grad_maps, Tensor bits, bool[] wanted, Tensor query, Tensor key, Tensor value, "
    "Tensor? bias, float scale, Tensor? content, Tensor? gate, Tensor? phrases, int renormalize, Tensor? head_mode, "
    "Tensor? capture_tokens, bool capture_final, bool capture_mean, SymInt max_content, Tensor? sink_tokens, "
    "Tensor? sink_heads, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _rows_backward(
    grad_out, grad_maps, bits, wanted, query, key, value, bias, scale, content, gate, phrases, renormalize, head_mode,
    capture_tokens, capture_final, capture_mean, max_content, sink_tokens, sink_heads, backend,
):  # fmt: skip
    rows = RowPlan(
        content, gate, phrases, renormalize=renormalize, head_mode=head_mode, capture_tokens=capture_tokens,
        capture_final=capture_final, capture_mean=capture_mean, max_content=max_content,
    )  # fmt: skip
    grads = fused(backend).backward(
        grad_out, grad_maps, query, key, value, bias, scale, rows, bits if bits.numel() else None, wanted, sink_tokens,
        sink_heads,
    )  # fmt: skip
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


@_rows_backward.register_fake
def _rows_backward_fake(
    grad_out, grad_maps, bits, wanted, query, key, value, bias, scale, content, gate, phrases, renormalize, head_mode,
    capture_tokens, capture_final, capture_mean, max_content, sink_tokens, sink_heads, backend,
):  # fmt: skip
    none = query.new_empty(0)
    grads = [
        torch.empty_like(x) if want else query.new_empty(0)
        for x, want in zip((query, key, value), wanted[:3], strict=True)
    ]
    grads.append(bias.new_empty(bias.shape) if wanted[3] else none)
    grads.append(gate.new_empty(gate.shape) if wanted[4] else query.new_empty(0))
    if wanted[5]:
        grads.append(query.new_empty((query.shape[0], sink_tokens.shape[0], query.shape[2]), dtype=torch.float32))
    else:
        grads.append(query.new_empty(0))
    return tuple(grads)


def _refuse_second(ctx, *grads):
    raise RuntimeError(NO_SECOND)


_rows_backward.register_autograd(_refuse_second)


@library.custom_op(
    "sdattn_fast::picture",
    mutates_args=(),
    schema=_ROWS_SCHEMA.replace(
        "bool return_bits, Tensor? sink, Tensor? sink_tokens, Tensor? sink_heads, str backend) "
        "-> (Tensor, Tensor, Tensor)",
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


@library.custom_op(
    "sdattn_fast::smooth",
    mutates_args=(),
    schema="(Tensor x, SymInt height, SymInt width, float sigma, int times, Tensor? where, str backend) -> Tensor",
)
def _smooth(x, height, width, sigma, times, where, backend):
    return fused(backend).smooth(x, (height, width), sigma, times, where)


@_smooth.register_fake
def _smooth_fake(x, height, width, sigma, times, where, backend):
    return x.new_empty(x.shape)


def _save_smooth(ctx, inputs, output):
    _, *ctx.grid, ctx.sigma, ctx.times, where, ctx.backend = inputs
    ctx.save_for_backward(where)


def _smooth_gradient(ctx, grad):
    # A symmetric kernel, edges reflected about the pixels' edge, is a symmetric matrix.
    (where,) = ctx.saved_tensors
    grad = torch.ops.sdattn_fast.smooth(grad, *ctx.grid, ctx.sigma, ctx.times, where, ctx.backend)
    return grad, None, None, None, None, None, None


_smooth.register_autograd(_smooth_gradient, setup_context=_save_smooth)
