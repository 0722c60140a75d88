"""Gradients of the fused backends: what the forward pass saves; how autograd, torch.func and torch.compile reach it.

Saved are the inputs and the selection bits (one bit an entry of a row, and none where the program decides nothing). A
backend's `backward` computes the rows again from the logits, with those decisions: nothing of a map's size is stored,
in either pass. The softmax's statistics are not saved: a row is whole where it is computed, so they cost a maximum and
an addition an entry, and saving them would cost memory.

Eager code goes through `torch.autograd.Function`, which torch.func knows (grad, vmap, their compositions); compiled
code through the ops of `op.py`, with the same formulas. Gradients of gradients are refused.

Source: docs/design.md, "Gradients".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..graphs import in_graph
from ..plan import RowPlan
from . import KernelRefused, fused, op
from .call import Relevance
from .reference import Fallback

__all__ = ["Relevance", "attention", "smooth", "transforming"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    backend: str,
    relevance: Relevance | None = None,
    fallback: Fallback | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A fused backend's `attention`, differentiable: out, which lies as the query does, and maps.

    Raises: KernelRefused, in the backward pass too where there is no fallback.
    """
    sink, tokens, heads = (
        (None, None, None) if relevance is None else (relevance.sink, relevance.tokens, relevance.heads)
    )
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    decides = rows.decides
    if in_graph():
        out, maps, _ = op.attention(query, key, value, bias, scale, rows, backend, decides, (sink, tokens, heads))
        return out, maps
    # Every tensor by itself: inside torch.func's transforms even what the plan made is wrapped.
    plan = [getattr(rows, name) for name in _PER_ENTRY + _SHARED]
    rows = _with_tensors(rows, [None] * len(plan))
    out, maps, _ = _Rows.apply(
        query, key, value, bias, sink, *plan, tokens, heads, scale, rows, decides, backend, fallback
    )
    return out, maps


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None, backend: str) -> Tensor:
    """A fused backend's `smooth`, differentiable, as often as one likes."""
    if in_graph():
        return op.smooth(x, grid, sigma, times, where, backend)
    return _Smooth.apply(x, where, grid, sigma, times, backend)


def transforming() -> bool:
    """Inside torch.func.vmap, grad and the like, whose tensors have no memory that a kernel could read."""
    return torch._C._are_functorch_transforms_active()


# The tensors of a RowPlan: those with an entry dimension, the gate first, and those without.
_PER_ENTRY = ("gate", "content", "phrases", "drop", "seed")
_SHARED = ("head_mode", "capture_tokens")


def _with_tensors(rows: RowPlan, plan: Sequence[Tensor | None]) -> RowPlan:
    return rows.replaced(**dict(zip(_PER_ENTRY + _SHARED, plan, strict=True)))


class _Rows(torch.autograd.Function):
    """Arguments: query, key, value, bias, sink, then the plan's tensors, then what Relevance has beside the sink."""

    @staticmethod
    def forward(query, key, value, bias, sink, *rest):
        *plan, _, _, scale, rows, decides, backend, _ = rest
        rows = _with_tensors(rows, plan)
        return fused(backend).attention(query, key, value, bias, scale, rows, return_bits=decides, keep_layout=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, bias, _, *plan_and_relevance, ctx.scale, ctx.rows, _, ctx.backend, ctx.fallback = inputs
        bits = output[2]
        if bits is not None:
            ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, bias, bits, *plan_and_relevance)

    @staticmethod
    def backward(ctx, grad_out, grad_maps, _):
        query, key, value, bias, sink, gate, *none = ctx.needs_input_grad
        wanted = (query, key, value, bias, gate, sink)
        if (grad_out is None and grad_maps is None) or not any(wanted):
            return (None,) * (6 + len(none))
        saved = ctx.saved_tensors
        try:
            grads = _RowsBackward.apply(grad_out, grad_maps, *saved, ctx.scale, ctx.rows, wanted, ctx.backend)
        except KernelRefused as error:
            if ctx.fallback is None or sink or transforming():
                raise
            ctx.fallback.pass_over(error, *saved[:3])
            grads = _plain_gradients(ctx.fallback, grad_out, grad_maps, (*saved[:4], saved[5]), wanted[:5])
        query, key, value, bias, gate, sink = grads
        return (query, key, value, bias, sink, gate, *(None for _ in none))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        batched = 5 + len(_PER_ENTRY)
        tensors = _folded(info.batch_size, _batch(inputs[0], in_dims[0]), in_dims, inputs[:batched])
        outputs = _Rows.apply(*tensors, *_checked(inputs[batched:], in_dims[batched:]))
        return _unfolded(info.batch_size, outputs)


def _plain_gradients(
    fallback: Fallback,
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of query, key, value, bias and gate, and None for the relevance."""
    with torch.enable_grad():
        leaves: list[Any] = [
            None if x is None else x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)
        ]
        results = fallback.attention(*leaves)
    pairs = [(y, g) for y, g in zip(results, (grad_out, grad_maps), strict=True) if y is not None and g is not None]
    to = [x for x, w in zip(leaves, wanted, strict=True) if w and x is not None]
    found = iter(torch.autograd.grad([y for y, _ in pairs], to, [g for _, g in pairs], materialize_grads=True))
    grads = [next(found) if w and x is not None else None for x, w in zip(leaves, wanted, strict=True)]
    return (*grads, None)


class _RowsBackward(torch.autograd.Function):
    """A function of its own, so that a second backward pass finds the refusal and torch.func.vmap its rule."""

    @staticmethod
    def forward(grad_out, grad_maps, query, key, value, bias, bits, *rest):
        *plan, tokens, heads, scale, rows, wanted, backend = rest
        rows = _with_tensors(rows, plan)
        return fused(backend).backward(
            grad_out, grad_maps, query, key, value, bias, scale, rows, bits, wanted, tokens, heads
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(op.NO_SECOND)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        batched, bias = 7 + len(_PER_ENTRY), inputs[5]
        batch = _batch(inputs[2], in_dims[2])
        tensors = _folded(info.batch_size, batch, in_dims, inputs[:batched])
        grads = _RowsBackward.apply(*tensors, *_checked(inputs[batched:], in_dims[batched:]))
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


# ---- torch.func.vmap: its dimension becomes a part of the batch ------------------------------------------------------


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


def _checked(shared: tuple[Any, ...], in_dims: tuple[Any, ...]) -> tuple[Any, ...]:
    if any(isinstance(x, Tensor) and dim is not None for x, dim in zip(shared, in_dims, strict=True)):
        raise RuntimeError("torch.func.vmap: heads and captured tokens are the same for every sample")
    return shared
