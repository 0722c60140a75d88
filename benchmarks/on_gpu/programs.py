"""The row programs that are checked and timed, and what they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.cli.bench import full_program
from sdattn_fast.functional import prepare

from .ground import DEVICE, DRY, LAYERS, TOKENS, prompt_inputs
from .timing import Call

__all__ = ["Tensors", "defined", "inputs", "prepared", "programs", "smooths"]

Tensors = tuple[Tensor, Tensor, Tensor]  # query, key, value

# The README's own: with smoothing.
README = Program(SalienceDropout(0.1), Refinement(threshold=0.1), renormalize="content")


def programs() -> dict[str, tuple[Program, dict[str, Any], dict[str, Any]]]:
    """By name: the program, what `prepare` is told beside it, what `prompt_inputs` is told."""
    full = full_program()
    every: dict[str, tuple[Program, dict[str, Any], dict[str, Any]]] = {
        "full": (full, {}, {}),
        "plain": (Program(), {}, {"content": TOKENS - 1, "words": False}),
        "readme": (README, {}, {"words": False}),
        "full-35": (full, {}, {"content": 35}),
        "full-50": (full, {}, {"content": 50}),
        "full-maps": (full, {"capture": Capture((1, 2, 3))}, {}),
    }
    return {name: every[name] for name in ("full", "readme")} if DRY else every


def smooths(program: str) -> bool:
    refine = programs()[program][0].refine
    return refine is not None and refine.sigma > 0


def inputs(shape: str, batch: int, dtype: torch.dtype) -> Tensors:
    """(B, H, M or N, D), as a UNet's projections give them: the heads of a pixel side by side."""
    layer = LAYERS[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(tokens: int) -> Tensor:
        x = torch.randn(batch, tokens, layer.num_heads, layer.head_dim, device=DEVICE, generator=generator)
        return x.to(dtype).transpose(1, 2)

    return randn(layer.pixels), randn(TOKENS), randn(TOKENS)


def prepared(program: str, shape: str, tensors: Tensors, backend: str, maps: bool = False) -> Call:
    """The call on these tensors, by a backend; gives (B, H, M, D). maps: gives the maps instead, (B, M, tokens)."""
    layer, (query, key, value) = LAYERS[shape], tensors
    row_program, settings, text = programs()[program]
    side = {"batch": len(query), "heads_count": layer.num_heads, "tokens": TOKENS, "device": DEVICE}
    ready = prepare(row_program, **side, **prompt_inputs(len(query), **text), **settings, backend=backend)
    grid = (layer.height, layer.width)
    if maps:
        return lambda: _by_pixel(ready(query, key, value, grid=grid)[1])
    return lambda: ready(query, key, value, grid=grid)[0]


def defined(program: str, shape: str, tensors: Tensors, maps: bool = False) -> Tensor:
    """What the definition makes of it in float64."""
    query, key, value = (x.double() for x in tensors)
    out = prepared(program, shape, (query, key, value), "reference", maps)()
    assert isinstance(out, Tensor)
    return out


def _by_pixel(maps: Tensor | None) -> Tensor:
    assert maps is not None
    return maps.transpose(1, 2)
