"""`semantic_attention`, and `prepare`, a reusable call for when the prompt is fixed across steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_products, check_program, check_seed, token_side
from .backend import NAMES
from .execute import Prepared
from .plan import make_plan
from .program import Capture, Program

__all__ = ["prepare", "semantic_attention"]


def semantic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    program: Program = Program(),
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    gate: Tensor | None = None,
    phrases: Tensor | None = None,
    protected: Tensor | None = None,
    active: Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    inactive_heads: str = "plain",
    grid: tuple[int, int] | None = None,
    seed: int | Tensor | None = None,
    capture: Capture | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-attention with a row program between its two products.

    Args:
        query: (B, H, M, D), any floating dtype; M = height * width pixels.
        key: (B, H, N, D); value: (B, H, N, Dv); the query's dtype and device. N tokens.
        program: what happens to the rows; ``Program()`` is plain attention.
        bias: floating, broadcasts to (B, H, M, N), added to the logits.
        scale: of the logits; None: 1/sqrt(D).
        gate: (B, N) or (B, H, N), bool, or finite and >= 0; multiplies content tokens' probabilities.
        phrases: (B, N) int; content tokens sharing an id >= 0 each get their mean; -1: none.
        protected: (B, N) bool; these keep their probability and take no part in statistics. None: all is content.
        active: (B,) bool; the others get plain attention. None: all.
        heads: indices of the active heads, or a bool (H,). None: all.
        inactive_heads: "plain", or "zero": they give zeros.
        grid: (height, width), needed where ``program.refine.sigma > 0``.
        seed: of the random mode, an int in [0, 2**63) or a one-element int64 tensor; None: from torch's generator.
        capture: which maps to return.
        backend: "auto", "triton", "cuda", "cpu" or "reference". A named one that cannot serve raises. N and D up to 256
            on the fast ones.

    Returns:
        out (B, H, M, Dv) in the value's dtype; with `capture`, (out, maps): maps float32, (B, T, M), or (B, H, T, M)
        for ``reduce="none"``.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected; ValueError also where a named
        backend cannot serve, with the reasons.
        backend.KernelRefused, a RuntimeError: where a named backend's kernel does not compile or launch, with the last
        line of the compiler or driver. "auto" goes on to the next backend, with one warning, except under
        torch.compile, whose graph has the backend in it, and in `torch.func`'s transforms of a backward pass.

    Source: docs/design.md, "The row program".
    """
    check_products(query, key, value)
    prepared = prepare(
        program,
        batch=query.shape[0],
        heads_count=query.shape[1],
        tokens=key.shape[2],
        device=query.device,
        gate=gate,
        phrases=phrases,
        protected=protected,
        active=active,
        heads=heads,
        inactive_heads=inactive_heads,
        seed=seed,
        capture=capture,
        backend=backend,
    )
    out, maps = prepared(query, key, value, bias=bias, scale=scale, grid=grid)
    return out if maps is None else (out, maps)


def prepare(
    program: Program,
    *,
    batch: int,
    heads_count: int,
    tokens: int,
    device: torch.device | str,
    gate: Tensor | None = None,
    phrases: Tensor | None = None,
    protected: Tensor | None = None,
    active: Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    inactive_heads: str = "plain",
    seed: int | Tensor | None = None,
    capture: Capture | None = None,
    backend: str = "auto",
) -> Prepared:
    """Check and lower everything that depends on the text alone, once, for many calls with the same text.

    Arguments are those of `semantic_attention`; batch, heads_count and tokens are B, H and N. device: where the inputs
    will be; "cuda" is the current GPU.

    Raises: TypeError, ValueError, as `semantic_attention`.
    """
    check_program(program, capture, tokens)
    check_seed(seed)
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend: expected one of {('auto', *NAMES)}, got {backend!r}")
    side = token_side(
        batch=batch,
        heads_count=heads_count,
        tokens=tokens,
        device=device,
        gate=gate,
        phrases=phrases,
        protected=protected,
        active=active,
        heads=heads,
        inactive_heads=inactive_heads,
    )
    plan = None if backend == "reference" else make_plan(program, side, capture)
    return Prepared(program, side, plan, capture, backend, seed)
