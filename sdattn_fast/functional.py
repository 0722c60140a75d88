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
    """Cross-attention with a program between its two matrix products, in one fused kernel.

    Args:
        query: (B, H, M, D) tensor of any floating dtype: B batch entries, H heads, M = height * width pixels.
        key: (B, H, N, D) tensor of the query's dtype and device, for N tokens.
        value: (B, H, N, Dv) tensor of the query's dtype and device.
        program: What happens to the rows of the map; ``Program()`` is plain attention.
        bias: Floating tensor that broadcasts to (B, H, M, N), added to the logits.
        scale: Factor of the logits. None: 1 / sqrt(D).
        gate: (B, N) or (B, H, N) tensor, bool or floating, finite and >= 0: factors of the content tokens'
            probabilities.
        phrases: (B, N) integer tensor: content tokens with the same id >= 0 each get their mean; -1: no phrase.
        protected: (B, N) bool tensor: tokens that keep their probability and are not counted, ranked or compared. The
            others are content. None: all are content.
        active: (B,) bool tensor: entries to which the program applies; the others get plain attention. None: all.
        heads: Indices of the active heads, or an (H,) bool tensor. None: all.
        inactive_heads: "plain": inactive heads get plain attention. "zero": their output is zero.
        grid: (height, width) in pixels, needed where ``program.refine.sigma > 0``.
        seed: Seeds of random dropout, an int64 tensor (B,): what is drawn for an entry depends on its own seed alone.
            An int s in [0, 2**63), or a tensor with one element, stands for s, s + 1, ..., s + B - 1. None: drawn
            from torch's generator.
        capture: Which maps to return. None: no maps.
        backend: "auto" takes the fastest backend that can serve the call. "triton", "cuda", "cpu" (all three up to 256
            tokens and head dimensions up to 256) and "reference" (plain PyTorch) take that backend or raise.

    Returns:
        The output (B, H, M, Dv), in the value's dtype. With `capture`, a tuple of the output and the maps: float32, (B,
        T, M) for T tokens, or (B, H, T, M) for ``reduce="none"``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or value, or the named backend cannot serve the call; the
            message says why.
        KernelRefused: A RuntimeError, of `sdattn_fast.backend`: if the kernel of a named backend does not compile or
            launch. "auto" warns once and takes the next backend, except inside a graph of torch.compile and in
            `torch.func` transforms of a backward pass.

    Examples:
        >>> query = torch.randn(2, 8, 256, 40)  # 8 heads, 16x16 pixels
        >>> key = value = torch.randn(2, 8, 77, 40)
        >>> gate = torch.ones(2, 77)
        >>> gate[:, 2] = 0.0  # mutes token 2
        >>> out = sdattn_fast.semantic_attention(query, key, value, gate=gate)

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
    out, maps = prepared.attend(query, key, value, bias, scale, grid)
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
    check_seed(seed, batch)
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
