"""Videos: what looks over a picture looks over each frame of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..execute import Prepared

__all__ = ["by_frames"]


def by_frames(prepared: Prepared, grid: tuple[int, int, int]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A prepared call of queries whose pixels are a video's, (frames, height, width)."""
    refine = prepared.program.refine

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        if refine is None or (refine.sigma == 0 and refine.axis == "token"):
            return prepared(query, key, value, **options)
        if options.pop("relevance") is not None:
            raise ValueError("grid: gradients of scores are served for pictures, not for the frames of videos")
        frames, height, width = grid
        bias, pixels = options.pop("bias"), height * width
        outs, maps = [], []
        for i in range(frames):
            at = slice(i * pixels, (i + 1) * pixels)
            of_frame = bias if bias is None or bias.shape[-2] == 1 else bias[..., at, :]
            out, map_ = prepared(query[:, :, at], key, value, **(options | {"grid": (height, width), "bias": of_frame}))
            outs.append(out)
            maps.append(map_)
        return torch.cat(outs, 2), None if maps[0] is None else torch.cat([m for m in maps if m is not None], -1)

    return attend
