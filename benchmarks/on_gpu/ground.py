"""Where things run, at which shapes. In a dry run on the CPU, small, with Triton's kernels interpreted."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from sdattn_fast.cli.registry import UNET_LAYERS, LayerShape

__all__ = ["DEVICE", "DRY", "LAYERS", "SHAPES", "SMALL", "TOKENS", "NotRun", "describe", "prompt_inputs", "why_no"]

DRY = os.environ.get("SDATTN_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
TOKENS = 77


class NotRun(Exception):
    """An item that cannot run here, which is neither passed nor failed."""


def _shapes() -> dict[str, LayerShape]:
    layers = {f"{model}-{x.height}x{x.width}": x for model in ("sd15", "sdxl") for x in UNET_LAYERS[model]}
    # What most of a step is spent on comes first.
    first = ("sd15-64x64", "sdxl-32x32", "sdxl-64x64")
    layers = {name: layers[name] for name in (*first, *(name for name in layers if name not in first))}
    if not DRY:
        return layers
    return {name: replace(layers[name], height=2, width=9, num_heads=2) for name in ("sd15-64x64", "sdxl-32x32")}


SHAPES = _shapes()  # that are checked and timed
SMALL = "small-5x7"  # for what is slow: rows that fill no tile
LAYERS = {**SHAPES, SMALL: LayerShape(1, 5, 7, 2, 40)}


def prompt_inputs(batch: int, content: int = 20, words: bool = True) -> dict[str, Any]:
    """Gate, phrases and token classes of a prompt of `content` tokens, or its token classes alone."""
    from sdattn_fast.cli.bench import text_side

    text = text_side(batch, TOKENS, content, DEVICE)
    return text if words else {"protected": text["protected"]}


def why_no(backend: str) -> str | None:
    """Why a backend cannot run here, or None."""
    from sdattn_fast import backend as backends

    if DRY and backend == "cuda":
        import emulated_cuda

        why = emulated_cuda.why_not()
        if why is None:
            emulated_cuda.use()
        return why
    return backends.unavailable(backend)


def describe(shape: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a figure says of its shape."""
    layer = LAYERS[shape]
    return {
        "shape": shape, "batch": batch, "heads": layer.num_heads, "pixels": layer.pixels, "head_dim": layer.head_dim,
        "tokens": TOKENS, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
