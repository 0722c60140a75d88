"""A layer's call, bound. At every step of a prompt but the first nothing changes but the query, so the first step's
checks, its choice of a backend and what it prepared are kept, and later steps see only that none of it has moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backend import autograd
from ..execute import BoundCall, Prepared
from ..folded_layer import FoldedText, call_folded
from ..streams import capturing, current_stream
from .layer_call import Ready
from .layers import Layer
from .map_sums import Grid
from .text_cache import KeyValue, Served, Weights

__all__ = ["BoundFold", "BoundLayer", "Moment", "bind"]


@dataclass(frozen=True)
class BoundFold:
    """A folded call of which the query, or the rows where they share one, and the seed are missing."""

    prepared: Prepared
    text: FoldedText
    grid: tuple[int, int] | None

    def __call__(self, query: Tensor, seed: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        return call_folded(self.prepared, query, self.text, grid=self.grid, seed=seed)


@dataclass(frozen=True)
class Moment:
    """What a layer's call hangs on beside the text and the weights.

    cache: of the TextState, which has the calls of its rows. state: of the layer. like: the rows' shape, strides, dtype
    and device. grid: (height, width), None where it is not known.
    """

    cache: dict[Any, Ready]
    state: tuple[Any, ...]
    like: tuple[Any, ...]
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, layer: Layer, attn: Any, x: Tensor, grid: Grid | None) -> Moment | None:
        """Of now; None where a call is one of a kind. x: (B, M, C)."""
        text = layer.text
        if torch.is_grad_enabled() or layer.bias is not None or layer.asks is not None or not text.settings.text_cache:
            return None
        if type(x) is not Tensor or autograd.transforming() or capturing(x.device):
            return None
        # The stream, since what another one made is waited for (`MadeOn`).
        state = text.step, attn.training, layer.captures, layer.heads, attn.scale_qk, current_stream(x.device)
        grid = layer.grid_of(x.shape[1]) if grid is None else grid
        return None if grid is not None and len(grid) == 3 else cls(text.cache, state, _like(x), grid)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Moment)
            and self.cache is other.cache
            and self.like == other.like
            and self.state == other.state
            and self.grid == other.grid
        )


@dataclass(frozen=True)
class BoundLayer:
    """A call with the keys and values of one layer and text, without gradients and mask.

    call: all of it but the query. weights: of what it keeps. query: what the query was like; None: the rows are it.
    """

    call: BoundCall | BoundFold
    weights: Weights
    moment: Moment
    query: tuple[Any, ...] | None

    @property
    def folded(self) -> FoldedText | None:
        return self.call.text if isinstance(self.call, BoundFold) else None

    def has_weights_of(self, attn: Any) -> bool:
        """Whether what is kept was made with the weights that a layer has now."""
        return self.weights.still_of(*_modules(attn, self.folded))

    def takes(self, query: Tensor) -> bool:
        """Whether a query is like the first one."""
        return type(query) is Tensor and _like(query) == self.query


def bind(
    moment: Moment,
    attn: Any,
    layer: Layer,
    entry: KeyValue,
    served: Served,
    query: Tensor | None,
    folded: FoldedText | None,
) -> BoundLayer | None:
    """The call that a layer just made, for the steps to come; None where they must look again. moment: of before the
    call was prepared, since another thread may have shown the model its own text meanwhile."""
    prepared, gate = served.prepared, layer.text.given.gate
    if gate is not None and gate.requires_grad:
        return None
    if not any(ready.prepared is prepared for ready in list(moment.cache.values())):
        return None
    weights = Weights.of(*_modules(attn, folded))
    if weights is None:
        return None
    call: BoundCall | BoundFold | None
    if folded is not None:
        call = BoundFold(prepared, folded, moment.grid)
    elif type(query) is not Tensor:
        return None
    else:
        scale = None if attn.scale_qk else 1.0
        call = prepared.bind(
            query, entry.key, entry.value, scale=scale, grid=moment.grid, folded_value=served.value_folded
        )
    if call is None:
        return None
    return BoundLayer(call, weights, moment, None if query is None else _like(query))


def _modules(attn: Any, folded: FoldedText | None) -> tuple[Any, ...]:
    """What goes into what is kept: keys and values, and the projections that are folded into them. norm_q, since a
    layer that has one is not folded."""
    of_text = attn.to_k, attn.to_v, attn.norm_cross, attn.norm_k
    return of_text if folded is None else (*of_text, attn.to_q, attn.to_out[0], attn.norm_q)


def _like(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device
