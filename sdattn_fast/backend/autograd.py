"""Gradients of the fused backends: what the forward pass saves, and how autograd, torch.func and torch.compile reach it.

Saved are the inputs and the selection bits (one bit an entry of a row, and none where the program decides nothing). A
backend's `backward` computes the rows again from the logits, with those decisions: nothing of a map's size is stored,
in either pass. The softmax's statistics are not saved: a row is whole where it is computed, so they cost a maximum and
an addition an entry, and saving them would cost memory.

Eager code goes through `torch.autograd.Function`, which torch.func knows (grad, vmap, their compositions); compiled code
through the ops of `op.py`, with the same formulas. Gradients of gradients are refused.

Source: DESIGN.md section 2, "Gradients".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..plan import RowPlan
from . import fused, op

__all__ = ["Relevance", "attention", "smooth", "transforming"]

@dataclass(frozen=True)
class Relevance:
    """Asks the backward pass for sum over heads of A * relu(dL/dA), A the program's probabilities: GradCAM's relevance.

    sink: (B, T, M) float32 that requires grad; its values are not read, and its gradient is the relevance. tokens: (T,)
    int32. heads: (H,) uint8, the heads to sum over; None: all.
    """

    sink: Tensor
    tokens: Tensor
    heads: Tensor | None = None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    backend: str,
    relevance: Relevance | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A fused backend's `attention`, differentiable: out, which lies as the query does, and maps."""
    sink, tokens, heads = (None, None, None) if relevance is None else (relevance.sink, relevance.tokens, relevance.heads)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    if torch.compiler.is_compiling():
        out, maps, _ = op.attention(query, key, value, bias, scale, rows, backend, rows.decides, (sink, tokens, heads))
        return out, maps
    out, maps, _ = _Rows.apply(query, key, value, bias, rows.gate, sink, scale, rows, (tokens, heads), backend)
    return out, maps


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None, backend: str) -> Tensor:
    """A fused backend's `smooth`, differentiable, as often as one likes."""
    if torch.compiler.is_compiling():
        return op.smooth(x, grid, sigma, times, where, backend)
    return _Smooth.apply(x, where, grid, sigma, times, backend)


def transforming() -> bool:
    """Inside torch.func.vmap, grad and the like, whose tensors have no memory that a kernel could read."""
    return torch._C._are_functorch_transforms_active()


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, bias, gate, sink, scale, rows, relevance, backend):
        rows = replace(rows, gate=gate)
        return fused(backend).attention(
            query, key, value, bias, scale, rows, return_bits=rows.decides, keep_layout=True
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, bias, gate, _, ctx.scale, ctx.rows, ctx.relevance, ctx.backend = inputs
        bits = output[2]
        if bits is not None:
            ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, bias, gate, bits)

    @staticmethod
    def backward(ctx, grad_out, grad_maps, _):
        wanted = tuple(ctx.needs_input_grad[:6])
        if (grad_out is None and grad_maps is None) or not any(wanted):
            return (None,) * 10
        grads = _RowsBackward.apply(
            grad_out, grad_maps, *ctx.saved_tensors, ctx.scale, ctx.rows, ctx.relevance, wanted, ctx.backend
        )
        return (*grads, None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, query, key, value, bias, gate, sink, scale, rows, relevance, backend):
        batch = _batch(query, in_dims[0])
        tensors = _folded(info.batch_size, batch, in_dims, (query, key, value, bias, gate, sink))
        return _unfolded(info.batch_size, _Rows.apply(*tensors, scale, _repeated(rows, info), relevance, backend))


class _RowsBackward(torch.autograd.Function):
    """A function of its own, so that a second backward pass finds the refusal and torch.func.vmap its rule."""

    @staticmethod
    def forward(grad_out, grad_maps, query, key, value, bias, gate, bits, scale, rows, relevance, wanted, backend):
        if grad_out is None:
            grad_out = value.new_zeros((1, 1, 1, 1)).expand(*query.shape[:3], value.shape[3])
        rows = replace(rows, gate=gate)
        return fused(backend).backward(
            grad_out, grad_maps, query, key, value, bias, scale, rows, bits, wanted, *relevance
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(op.NO_SECOND)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        batch, bias = _batch(inputs[2], in_dims[2]), inputs[5]
        tensors = _folded(info.batch_size, batch, in_dims, inputs[:8])
        scale, rows, relevance, wanted, backend = inputs[8:]
        grads = _RowsBackward.apply(*tensors, scale, _repeated(rows, info), relevance, wanted, backend)
        grads, dims = _unfolded(info.batch_size, grads)
        if grads[3] is not None and _batch(bias, in_dims[5]) < batch:
            grads = (*grads[:3], grads[3].sum(1, keepdim=True), *grads[4:])
        return grads, dims


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(x, where, grid, sigma, times, backend):
        return fused(backend).smooth(x, grid, sigma, times, where)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, where, *ctx.how = inputs
        ctx.save_for_backward(where)

    @staticmethod
    def backward(ctx, grad):
        # A symmetric kernel with edges reflected about the pixels' edge is a symmetric matrix.
        return _Smooth.apply(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, x, where, *how):
        x = x.movedim(in_dims[0], 0)
        where = None if where is None else where.expand(x.shape[1:3]).repeat(info.batch_size, 1)
        return _unfolded(info.batch_size, _Smooth.apply(x.flatten(0, 1), where, *how))


# ---- torch.func.vmap: its dimension becomes a part of the batch -------------------------------------------------------


def _batch(x: Tensor, dim: int | None) -> int:
    return x.shape[0] if dim is None or dim > 0 else x.shape[1]


def _folded(size: int, batch: int, in_dims: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """(B, ...) or (1, ...) with or without vmap's dimension to (size * B, ...)."""
    folded = []
    for x, dim in zip(tensors, in_dims, strict=False):
        if x is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
        folded.append(x)
    return folded


def _unfolded(size: int, outputs: Any) -> tuple[Any, Any]:
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (size, -1)), 0
    tensors = tuple(None if x is None else x.unflatten(0, (size, -1)) for x in outputs)
    return tensors, tuple(None if x is None else 0 for x in outputs)


def _repeated(rows: RowPlan, info: Any) -> RowPlan:
    if rows.random_ratio >= 0 and info.randomness != "different":
        raise RuntimeError(
            f"torch.func.vmap: a program with mode 'random' draws anew for every sample; expected "
            f"randomness='different', got {info.randomness!r}"
        )
    names = ("content", "gate", "phrases", "drop")
    tensors = {name: getattr(rows, name) for name in names}
    return replace(rows, **{n: x.repeat(info.batch_size, *(1,) * (x.dim() - 1)) for n, x in tensors.items() if x is not None})
