"""A layer's cross-attention: its call found or prepared, its text taken from what is kept, its maps handed on.

Source: docs/design.md, "From pipe(...) to a kernel and back".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import checked_heads
from ..backend import KernelRefused
from ..folded_layer import FoldedText, call_folded, may_sum_heads
from ..graphs import in_graph
from ..streams import capturing, to_device
from .bound import Moment, bind
from .early_end import keep_maps
from .fold import choose_fold, fold_refusal, fold_text, shape_of
from .frames import by_frames
from .keys_values import kept_key_value
from .layer_call import LayerCall
from .layers import LAYER, Layer
from .map_sums import Grid
from .projections import AddImage, key_value, project_out, query_of
from .settings import Settings
from .text_cache import KeyValue, Served
from .text_padding import TextPadding

__all__ = ["cross_attention"]


def cross_attention(
    self: Any,
    attn: Any,
    x: Tensor,
    states: Tensor,
    mask: Tensor | None,
    grid: Grid | None,
    add_image: AddImage,
    rotary: Any,
) -> Tensor:
    """Up to and with `to_out[0]`: x (B, M, C) attends to the text, states (B, N, E), through the program."""
    layer: Layer | None = getattr(attn, LAYER, None)
    if layer is not None and not in_graph():
        layer = layer.of_thread()
    padding, frames = (None, None) if layer is None else layer.text.of_layer(states)
    if layer is not None and frames is not None:
        # A pixel's row knows nothing of other pixels, so the frames of an entry are but more of them.
        if grid is None and layer.grid is not None and len(layer.grid) == 2:
            layer.grid = (frames, *layer.grid)
        mask = None if mask is None or len(mask) == 1 else mask[::frames]
        rows, states = x.unflatten(0, (-1, frames)).flatten(1, 2), states[::frames].contiguous()
        of_frames = _of_entries(self, attn, layer, rows, states, mask, None, add_image, rotary, padding)
        return of_frames.unflatten(1, (frames, -1)).flatten(0, 1)
    return _of_entries(self, attn, layer, x, states, mask, grid, add_image, rotary, padding)


def _of_entries(
    self: Any,
    attn: Any,
    layer: Layer | None,
    x: Tensor,
    states: Tensor,
    mask: Tensor | None,
    grid: Grid | None,
    add_image: AddImage,
    rotary: Any,
    padding: TextPadding | None,
) -> Tensor:
    """As `cross_attention`, of entries that each have a text of their own."""
    query = moment = None
    if layer is not None and layer.text.reads_own_text and mask is None and rotary is None and not in_graph():
        moment = Moment.of(layer, attn, x, grid)
    if layer is not None and moment is not None:
        again, query = _as_before(attn, layer, moment, x, states, add_image)
        if again is not None:
            return again
    seed: Tensor | None = None
    heads_count = int(attn.heads)
    batch, pixels = states.shape[0], x.shape[1]
    settings: Settings = self.settings
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, float("-inf"))
    if layer is None:
        text, heads, across_heads = self.text, checked_heads(self.heads, heads_count, " in this layer"), False
        if text.given.seed is not None and settings.draws:
            seed = to_device(torch.tensor(text.entry_seeds(batch)), x.device)
    else:
        text, heads, across_heads = layer.text, layer.heads, layer.across_heads
        seed = layer.seeds(states, batch)
        grid = layer.grid_of(pixels) if grid is None else grid
    tokens, columns, recorded = states.shape[1], None, in_graph()
    padding = None if recorded else padding
    if padding is not None:
        columns = text.columns(padding)
        if columns < tokens:
            states = states[:, :columns].contiguous()  # else a projection copies its weights for each entry
            mask = padding.bias(mask, columns, x.device)
    relevance = None
    if layer is not None:
        relevance = layer.relevance(batch, pixels, x.device)
        if layer.bias is not None:
            of_layer = layer.bias.to(x.device, x.dtype)[..., :columns]
            mask = of_layer if mask is None else mask + of_layer
    graph = None if layer is None or recorded else layer.text.graph_of_capture(x.device)
    refine = settings.program.refine
    if grid is None and refine is not None and refine.sigma > 0:
        where = "a processor set by hand" if layer is None else f"layer {layer.name!r}"
        raise ValueError(
            f"grid: {where} does not know the height and width of its {pixels} pixels, which smoothing "
            "(Refinement.sigma > 0) needs; sdattn_fast.apply takes them from the enclosing Transformer2DModel"
        )
    captures = layer is not None and layer.captures
    if torch.jit.is_tracing():  # sizes are tensors there
        batch, tokens = int(batch), int(tokens)
    call = LayerCall(batch, heads_count, tokens, states.device, heads, captures, attn.training, columns, padding)
    key = entry = folded_value = folded = None
    if recorded and layer is not None and layer.compiled is not None and layer.compiled.serves(call):
        compiled = layer.compiled
        prepared = text.with_gate(compiled.prepared, call)
        if compiled.text is states:
            key, value, folded_value = compiled.key, compiled.value, compiled.folded_value
    else:
        prepared = text.prepared(call)
        entry = None if recorded else kept_key_value(text, attn, states, first_look=layer is None)
    if entry is not None:
        served = entry.serve(prepared)
        key, value, folded_value = entry.key, entry.value, served.value_folded
        folded = None if relevance is not None else _folded(settings, attn, entry, served, x, add_image)
    elif settings.fold == "always":
        raise ValueError("fold: 'always' needs text that stands still, and this call's may not be kept")
    if key is None:
        key, value = key_value(attn, states, across_heads=across_heads)
    if folded is not None and folded.shared_query:
        query = None
    elif query is None:
        query = query_of(attn, x, across_heads, rotary)
    picture = None if grid is None or len(grid) == 3 else grid
    if folded is not None:
        out, maps = call_folded(prepared, x if query is None else query, folded, bias=mask, grid=picture, seed=seed)
    else:
        assert query is not None
        # Not attn.scale: a block compiled for layers of several widths would make a symbol of it.
        scale = None if attn.scale_qk else 1.0
        attend = prepared if grid is None or len(grid) == 2 else by_frames(prepared, grid)
        out, maps = attend(
            query, key, value, bias=mask, scale=scale, grid=picture, seed=seed, folded_value=folded_value,
            relevance=relevance,
        )  # fmt: skip
    if entry is not None and layer is not None and graph is None:
        entry.bound = None if moment is None else bind(moment, attn, layer, entry, served, query, folded)
    if maps is not None and layer is not None:
        if padding is not None and prepared.capture is not None and prepared.capture.tokens is None:
            maps = maps[..., : padding.content, :]
        keep_maps(layer, (maps, prepared.home.side.active, grid))
    if folded is None or not folded.summed:
        out = project_out(attn, out, x if query is None else query, add_image)
    if graph is not None and layer is not None:
        graph.keep(layer, call, entry, maps)
        return graph.guarded(out, maps)
    return out


def _as_before(
    attn: Any, layer: Layer, moment: Moment, x: Tensor, states: Tensor, add_image: AddImage
) -> tuple[Tensor | None, Tensor | None]:
    """As `cross_attention`, by the call that an earlier step bound, None where something has moved since; and the
    query, None if it was not needed so far."""
    bound = layer.text.cached.bound(attn, states)
    if bound is None or bound.moment != moment:
        return None, None
    folded = bound.folded
    if folded is not None and add_image is not None:
        return None, None
    query = None
    if folded is None or not folded.shared_query:
        query = query_of(attn, x)
        if not bound.takes(query):
            return None, query
    try:
        out, maps = bound.call(x if query is None else query, layer.seeds(states, x.shape[0]))
    except KernelRefused:
        return None, query
    if maps is not None:
        keep_maps(layer, (maps, bound.call.prepared.home.side.active, moment.grid))
    if folded is None or not folded.summed:
        out = project_out(attn, out, x if query is None else query, add_image)
    return out, query


def _folded(
    settings: Settings, attn: Any, entry: KeyValue, served: Served, x: Tensor, add_image: AddImage
) -> FoldedText | None:
    prepared = served.prepared
    if settings.fold == "never":
        return None
    refusal = "an IP-Adapter adds its part to the heads" if add_image is not None else None
    if refusal is None and x.dtype != entry.key.dtype:
        refusal = f"x is {x.dtype} and the keys {entry.key.dtype}"
    refusal = refusal or fold_refusal(attn, prepared, x)
    may_out = refusal is None and may_sum_heads(prepared)
    if settings.fold == "always":
        if refusal is not None:
            raise ValueError(f"fold: 'always' cannot be served, because {refusal}")
        kind = "both" if may_out else "query"
    elif refusal is None and x.device.type == "cpu":  # nothing was measured on a GPU yet, and nothing is guessed
        kind = choose_fold(shape_of(attn, entry.key, x, prepared), may_out=may_out)
    else:
        return None
    if kind == "none":
        return None
    name = kind if attn.scale_qk else f"{kind}, unscaled"
    folded = served.folds.get(name)
    if folded is None:
        folded = fold_text(attn, kind, entry.key, entry.value, prepared)
        if not capturing(x.device):  # what is made in a capture is the graph's
            served.folds[name] = folded
    return folded
