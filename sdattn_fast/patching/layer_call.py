"""A layer's call, before its tensors are there: what it is prepared for, and what it is when it is ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..execute import Prepared
from ..streams import MadeOn
from .text_padding import TextPadding

__all__ = ["LayerCall", "Ready"]


class LayerCall(NamedTuple):
    """What a layer's text is prepared for: keys (batch, num_heads, tokens, D) on a device.

    heads: the active ones, None for all. captures: with the settings' capture. training: the layer is in train mode.
    columns: so many of the tokens, from the first on, the layer is to see; None: all. padding: of the text.
    """

    batch: int
    num_heads: int
    tokens: int
    device: torch.device
    heads: tuple[int, ...] | None = None
    captures: bool = False
    training: bool = False
    columns: int | None = None
    padding: TextPadding | None = None


@dataclass
class Ready:
    """A call, and where its tensors were made. compiled: the call as graphs of torch.compile read it."""

    prepared: Prepared
    made: MadeOn | None
    compiled: Prepared | None = None
