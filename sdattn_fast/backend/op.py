"""The fused backends as PyTorch custom ops, so that torch.compile takes them whole.

A schema is flat, so a plan travels as its fields. The dictionaries below name these, with their types, once: schemas,
kernels and gradients are made from them. A result that is None is an empty tensor to an op.

Eager code calls the backend modules directly: a custom op costs tens of microseconds a call, as much as a small layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from ..plan import PicturePlan, RowPlan
from . import fused
from .gradients import Gradients
from .results import empty_bits, empty_results

__all__ = ["attention", "picture_attention", "smooth", "NO_SECOND"]

# Hugging Face's kernels library loads several versions of this code into one process, each under a name of its own.
_NAMESPACE = __name__.partition(".")[0]
_OPS = getattr(torch.ops, _NAMESPACE)

NO_SECOND = (
    "sdattn_fast: the fused backends have no gradient of the gradient; backend='reference' has one (without "
    "create_graph=True, or with a single torch.func.grad, none is asked for)"
)

_INPUTS = {"query": "Tensor", "key": "Tensor", "value": "Tensor", "bias": "Tensor?", "scale": "float"}
_ROWS = {  # fields of RowPlan
    "content": "Tensor?", "gate": "Tensor?", "phrases": "Tensor?", "drop": "Tensor?", "random_ratio": "float",
    "seed": "Tensor?", "threshold": "float", "renormalize": "int", "head_mode": "Tensor?", "capture_tokens": "Tensor?",
    "capture_final": "bool", "capture_mean": "bool", "max_content": "SymInt", "max_drop": "SymInt",
}  # fmt: skip
_PICTURE = {"steps": "int", "sigma": "float", "drop_ratio": "float", "nms": "bool", "active": "Tensor?"}  # PicturePlan
_RELEVANCE = {"sink": "Tensor?", "sink_tokens": "Tensor?", "sink_heads": "Tensor?"}


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
    out, maps, bits = _OPS.rows(query, key, value, bias, scale, *_fields(rows), return_bits, *relevance, backend)
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
    over_picture = [getattr(picture, name) for name in _PICTURE]
    out, maps = _OPS.picture(query, key, value, bias, scale, *_fields(rows), *over_picture, height, width, backend)
    return out, maps if rows.capture_tokens is not None else None


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None, backend: str) -> Tensor:
    """A fused backend's `smooth` through the op ``sdattn_fast::smooth``."""
    return _OPS.smooth(x, grid[0], grid[1], sigma, times, where, backend)


def add_op_namespace_prefix(name: str) -> str:
    """An op's whole name. The builder of kernels for the Hub wants this function, by this name, in every decorator."""
    return f"{_NAMESPACE}::{name}"


# ---- flat and back ---------------------------------------------------------------------------------------------------


def _schema(arguments: dict[str, str], results: int) -> str:
    flat = ", ".join(f"{kind} {name}" for name, kind in arguments.items())
    return f"({flat}) -> ({', '.join(['Tensor'] * results)})"


def _fields(rows: RowPlan) -> list[Any]:
    """What `_ROWS` lists."""
    fields = [getattr(rows, name) for name in _ROWS]
    return fields if rows.bounds is None else [*fields[:-2], *rows.bounds.shape[:2]]


def _unflattened(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(query, key, value, bias, scale, rows), and the arguments behind them."""
    inputs, rows, rest = arguments[:5], arguments[5 : 5 + len(_ROWS)], arguments[5 + len(_ROWS) :]
    return (*inputs, RowPlan(**dict(zip(_ROWS, rows, strict=True)))), rest


def _no_none(like: Tensor, *results: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0, dtype=dtype) if x is None else x for x in results)


# ---- rows ------------------------------------------------------------------------------------------------------------

_ROWS_OP = {**_INPUTS, **_ROWS, "return_bits": "bool", **_RELEVANCE, "backend": "str"}


@library.custom_op(add_op_namespace_prefix("rows"), mutates_args=(), schema=_schema(_ROWS_OP, 3))
def _rows(*arguments):
    inputs, (return_bits, *_, backend) = _unflattened(arguments)
    return _rows_results(inputs[0], *fused(backend).attention(*inputs, return_bits=return_bits))


@_rows.register_fake
def _rows_fake(*arguments):
    (query, key, value, _, _, rows), (return_bits, *_) = _unflattened(arguments)
    bits = empty_bits(query, key.shape[2]) if return_bits else None
    return _rows_results(query, *empty_results(query, value, rows, keep_layout=False), bits)


def _rows_results(query, out, maps, bits):
    return *_no_none(query, out, maps), *_no_none(query, bits, dtype=torch.int32)


_DIFFERENTIABLE = ("query", "key", "value", "bias", "gate", "sink")
# The bits say what was decided, so that the gradients read nothing of how.
_UNREAD = ("drop", "random_ratio", "seed", "threshold", "max_drop", "return_bits", "sink")
_SAVED = {name: kind for name, kind in _ROWS_OP.items() if name not in _UNREAD}


def _save(ctx, inputs, output):
    by_name = dict(zip(_ROWS_OP, inputs, strict=True))
    ctx.tensors = [name for name in _SAVED if isinstance(by_name[name], Tensor)]
    ctx.others = {name: by_name[name] for name in _SAVED if name not in ctx.tensors}
    ctx.save_for_backward(output[2], *(by_name[name] for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def _rows_gradients(ctx, grad_out, grad_maps, _):
    bits, *tensors = ctx.saved_tensors
    saved = {**ctx.others, **dict(zip(ctx.tensors, tensors, strict=True))}
    needs = dict(zip(_ROWS_OP, ctx.needs_input_grad, strict=True))
    wanted = [needs[name] for name in _DIFFERENTIABLE]
    if (grad_out is None and grad_maps is None) or not any(wanted):
        return (None,) * len(_ROWS_OP)
    in_order = [saved[name] for name in _SAVED]
    grads = _OPS.rows_backward(grad_out, grad_maps, bits, wanted, *in_order)
    by_name = {name: grad for name, grad, want in zip(_DIFFERENTIABLE, grads, wanted, strict=True) if want}
    return tuple(by_name.get(name) for name in _ROWS_OP)


_rows.register_autograd(_rows_gradients, setup_context=_save)

_BACKWARD_OP = {"grad_out": "Tensor?", "grad_maps": "Tensor?", "bits": "Tensor", "wanted": "bool[]", **_SAVED}


@library.custom_op(
    add_op_namespace_prefix("rows_backward"), mutates_args=(), schema=_schema(_BACKWARD_OP, len(_DIFFERENTIABLE))
)
def _rows_backward(grad_out, grad_maps, bits, wanted, *saved):
    x, rows = _by_name(saved)
    inputs = (x["query"], x["key"], x["value"], x["bias"], x["scale"], rows, bits if bits.numel() else None)
    grads = fused(x["backend"]).backward(grad_out, grad_maps, *inputs, wanted, x["sink_tokens"], x["sink_heads"])
    return _no_none(x["query"], *grads)


@_rows_backward.register_fake
def _rows_backward_fake(grad_out, grad_maps, bits, wanted, *saved):
    x, rows = _by_name(saved)
    inputs = x["query"], x["key"], x["value"], x["bias"], rows.gate
    return _no_none(x["query"], *Gradients.empty(*inputs, wanted, x["sink_tokens"]).results(x["bias"], rows))


def _by_name(saved):
    x = dict(zip(_SAVED, saved, strict=True))
    return x, RowPlan(**{name: x[name] for name in _ROWS if name in x})


def _refuse_second(ctx, *grads):
    raise RuntimeError(NO_SECOND)


_rows_backward.register_autograd(_refuse_second)


# ---- picture ---------------------------------------------------------------------------------------------------------

_PICTURE_OP = {**_INPUTS, **_ROWS, **_PICTURE, "height": "SymInt", "width": "SymInt", "backend": "str"}


@library.custom_op(add_op_namespace_prefix("picture"), mutates_args=(), schema=_schema(_PICTURE_OP, 2))
def _picture(*arguments):
    inputs, (*picture, height, width, backend) = _unflattened(arguments)
    picture = PicturePlan(**dict(zip(_PICTURE, picture, strict=True)))
    return _no_none(inputs[0], *fused(backend).picture_attention(*inputs, picture, (height, width)))


@_picture.register_fake
def _picture_fake(*arguments):
    (query, _, value, _, _, rows), _ = _unflattened(arguments)
    return _no_none(query, *empty_results(query, value, rows, keep_layout=False))


# ---- smooth ----------------------------------------------------------------------------------------------------------


@library.custom_op(
    add_op_namespace_prefix("smooth"),
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
    grad = _OPS.smooth(grad, *ctx.grid, ctx.sigma, ctx.times, where, ctx.backend)
    return grad, None, None, None, None, None, None


_smooth.register_autograd(_smooth_gradient, setup_context=_save_smooth)
