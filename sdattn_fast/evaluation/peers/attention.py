"""Attention maps as the papers have them: softmax probabilities, kept with their gradient, by a plain processor.

Nothing of our kernels: what is measured here is also what they are measured by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...patching.layers import cross_attention_layers

__all__ = ["KeptMaps", "as_grid", "cross_attention_grids", "no_such_grid"]


class KeptMaps:
    """While entered, attention layers of one grid keep their maps; all others run as before.

    Args:
        unet: of diffusers. grid: (height, width) of the layers' queries. own: self-attention, too.
    """

    def __init__(self, unet: Any, grid: tuple[int, int], own: bool = False) -> None:
        self.grid = grid
        self.layers = [attn for _, attn in cross_attention_layers(unet)]
        if own:
            self.layers += [m for m in unet.modules() if getattr(m, "is_cross_attention", None) is False]
        self._before: dict[int, Any] = {}
        self._cross: list[Tensor] = []
        self._own: list[Tensor] = []

    def __enter__(self) -> KeptMaps:
        self._before = {id(attn): attn.processor for attn in self.layers}
        for attn in self.layers:
            attn.set_processor(self)
        return self

    def __exit__(self, *error: Any) -> None:
        for attn in self.layers:
            attn.set_processor(self._before[id(attn)])

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Tensor:
        batch, queries, _ = hidden_states.shape
        if queries != self.grid[0] * self.grid[1]:
            before = self._before[id(attn)]
            return before(attn, hidden_states, encoder_hidden_states, attention_mask)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attn.prepare_attention_mask(attention_mask, text.shape[1], batch)
        query, key, value = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        shares = attn.get_attention_scores(query, key, mask)
        (self._own if encoder_hidden_states is None else self._cross).append(shares)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(shares @ value)))

    def cross(self) -> Tensor:
        """(height, width, tokens) of one picture, the mean over layers and heads, in float32 or float64."""
        return _mean(self._cross).unflatten(0, self.grid)

    def own(self) -> Tensor:
        """(height * width, height * width), likewise: of each query, how much it looks at each place."""
        return _mean(self._own)


def as_grid(resolution: int | tuple[int, int]) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else (resolution[0], resolution[1])


def cross_attention_grids(unet: Any) -> set[tuple[int, int]]:
    """The (height, width) at which a UNet2DConditionModel looks at the text, for pictures of its own size."""
    size = unet.config.sample_size
    grids = [(size, size) if isinstance(size, int) else tuple(size)]
    for _ in unet.down_blocks[1:]:
        grids.append(tuple(-(-side // 2) for side in grids[-1]))  # a convolution of stride 2 rounds up
    at = [*zip(unet.down_blocks, grids, strict=True), (unet.mid_block, grids[-1])]
    at += zip(unet.up_blocks, reversed(grids), strict=True)
    return {grid for block, grid in at if block is not None and any(cross_attention_layers(block))}


def no_such_grid(unet: Any, resolution: int | tuple[int, int]) -> str | None:
    """Why a peer finds no maps of this resolution; None where it does."""
    grids = cross_attention_grids(unet)
    if as_grid(resolution) in grids:
        return None
    there = ", ".join(f"{height}x{width}" for height, width in sorted(grids, reverse=True)) or "none"
    height, width = as_grid(resolution)
    return f"no cross-attention at {height}x{width}; there is {there}"


def _mean(maps: list[Tensor]) -> Tensor:
    """Of (heads, queries, keys) of some layers, (queries, keys)."""
    every = torch.cat(maps)
    return every.to(torch.promote_types(every.dtype, torch.float32)).mean(0)
