"""A checked call, run: on the backend that serves it, through the path that gradients and graphs want, and smoothed."""

from __future__ import annotations

from torch import Tensor

from ..graphs import in_graph
from . import KernelRefused, autograd, choose, fused, op, pass_over, reference
from .call import AttentionCall
from .smoothing import smoothed

__all__ = ["run", "run_fused"]


def run(backend: str, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """(out, maps) of a backend, or of the fastest that serves the call ("auto"); maps None without capture.

    Raises: ValueError where the named backend cannot serve it; KernelRefused.
    """
    recorded = in_graph()
    # Under torch.compile the choice is a constant of the graph.
    may_pass_over = backend == "auto" and not recorded
    while True:
        name = choose(backend, call)
        if name == "reference":
            return reference.attention(call)
        try:
            return run_fused(name, call, recorded, may_pass_over)
        except KernelRefused as error:
            if not may_pass_over:
                raise
            pass_over(error, call)


def run_fused(
    name: str, call: AttentionCall, recorded: bool = False, may_pass_over: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, maps) of a fused backend. recorded: kernels must be seen as ops. may_pass_over: where its backward kernel
    does not launch, gradients come from the reference. Raises: KernelRefused."""
    plan = call.lowered.plan
    assert plan is not None
    value = call.lowered.fold_value(call.value) if call.folded_value is None else call.folded_value
    inputs = call.query, call.key, value, call.bias, call.scale, call.lowered.seeded_rows(call.seed)
    # torch.func's transforms want rules as autograd does, whether or not anything requires grad.
    needs_grad = call.needs_grad or autograd.transforming()
    # An op's out is contiguous; eager out lies as the query does, so that merging the heads is a view.
    maps: Tensor | None
    if plan.picture is not None and recorded:
        out, maps = op.picture_attention(*inputs, plan.picture, call.grid, name)
    elif plan.picture is not None:
        out, maps = fused(name).picture_attention(*inputs, plan.picture, call.grid, keep_layout=True)
    elif needs_grad:
        fallback = reference.Fallback(call.lowered, call.scale, call.seed) if may_pass_over else None
        out, maps = autograd.attention(*inputs, name, call.relevance, fallback)
    elif recorded:
        out, maps, _ = op.attention(*inputs, name)
    else:
        out, maps, _ = fused(name).attention(*inputs, keep_layout=True)
    return smoothed(name, out, maps, plan, call.grid, needs_grad, recorded)
