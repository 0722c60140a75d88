"""Salience dropout as it was first sketched: a random mask multiplied on the logits, for every token and every entry.

A logit times zero is not a token that is dropped: it is one of middling weight. Plain torch, for comparison alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..patching.layers import cross_attention_layers

__all__ = ["RandomMasks"]


class RandomMasks:
    """While entered, the UNet's cross-attention runs softmax(mask * logits), each mask entry 0 with `ratio`."""

    def __init__(self, unet: Any, ratio: float) -> None:
        self.layers = [attn for _, attn in cross_attention_layers(unet)]
        self.ratio = ratio
        self._before: list[Any] = []
        self._generator = torch.Generator().manual_seed(0)

    def __enter__(self) -> RandomMasks:
        self._before = [attn.processor for attn in self.layers]
        for attn in self.layers:
            attn.set_processor(self)
        return self

    def __exit__(self, *error: Any) -> None:
        for attn, processor in zip(self.layers, self._before, strict=True):
            attn.set_processor(processor)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(to(text)) for to in (attn.to_k, attn.to_v))
        logits = query @ key.transpose(-1, -2) * attn.scale
        mask = torch.rand(logits.shape, generator=self._generator) >= self.ratio
        out = torch.softmax(logits * mask.to(logits), -1) @ value
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(out)))
