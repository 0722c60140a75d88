"""Texts that CUDA graphs read. A graph reads the same memory at every replay, and no Python runs then; so

- what a captured layer reads of its text (token side, keys, values, what is folded) stays where it is, alive, while the
  patch lives;
- after the text's tensor was written to, `rewrite` writes all that anew, in place (`Patch.update_text`, or the model's
  next call from Python);
- the graph itself compares its text with the one that was shown last, and gives NaN where they differ: a picture that
  is plainly broken, not one that looks right and is of another prompt.

Source: docs/design.md, "When cached text is stale".
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..execute import Prepared
from ..places import Place
from .fold import fold_text
from .keys_values import modules_of_text
from .layer_call import LayerCall
from .layers import Layer
from .projections import key_value
from .rewrite import difference, rewrite, rewrite_tensors
from .text_cache import KeyValue, Served, TextCache, Weights
from .text_rows import Rows

__all__ = ["GraphText"]


@dataclass(frozen=True)
class HeldLayer:
    """What a graph reads in one layer.

    entry, served: None where the graph makes its own keys and values. autocast: the dtype, None where it was off.
    """

    layer: Layer
    entry: KeyValue | None
    served: Served | None
    autocast: torch.dtype | None

    def is_same(self, other: HeldLayer) -> bool:
        return self.layer is other.layer and self.entry is other.entry and self.served is other.served


@dataclass
class GraphText:
    """One text, (B, N, E), and what graphs read of it. text: the tensor that they were captured with.

    shown: its numbers when all that was made. calls: each with the key that it was prepared for. maps: of a layer, what
    the graph captured last writes, weakly. no_room: the version of a text that did not fit. is_guarded: by the
    capture that is running.
    """

    number: int
    text: Tensor
    shown: Tensor
    rows: Rows | None
    calls: list[tuple[Any, Prepared]] = field(default_factory=list)
    layers: list[HeldLayer] = field(default_factory=list)
    maps: dict[str, tuple[weakref.ref[Tensor], Prepared]] = field(default_factory=dict)
    no_room: int | None = None
    is_guarded: bool = False

    def keep(self, layer: Layer, call: LayerCall, entry: KeyValue | None, maps: Tensor | None) -> None:
        """What a layer read, and the maps that it wrote, while a graph was captured."""
        prepared = layer.text.ready(call).prepared
        served = None if entry is None else entry.served
        if served is not None and served.prepared is not prepared:  # the graph makes its own
            served = None
        kind = self.text.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        held = HeldLayer(layer, entry, served, autocast)
        if not any(one.is_same(held) for one in self.layers):
            self.layers.append(held)
        if not any(one is prepared for _, one in self.calls):
            self.calls.append(((call, prepared.program.dropout), prepared))
        if maps is not None:
            self.maps[layer.name] = weakref.ref(maps), prepared

    def is_in(self, text: Tensor) -> bool:
        """Whether a tensor is the memory that the graphs read, whatever is in it now."""
        return Place(self.text).same_view(Place(text))

    def guarded(self, out: Tensor, maps: Tensor | None) -> Tensor:
        """out (B, M, C) of a layer in a graph. Of the first layer with NaN in it and in its maps where the text was not
        shown: the model spreads them."""
        if self.is_guarded:
            return out
        self.is_guarded = True
        changed = (self.text != self.shown).any()
        if maps is not None:
            maps.detach().masked_fill_(changed, torch.nan)
        if torch.is_grad_enabled():
            return out.masked_fill(changed, torch.nan)
        out[:, :1, :1].masked_fill_(changed, torch.nan)
        return out

    def has_weights_of_now(self) -> bool:
        """Whether keys and values are of the weights that the layers have now."""
        entries = [(held.entry, held.layer.attn) for held in self.layers if held.entry is not None]
        return all(entry.weights.still_of(*modules_of_text(attn)) for entry, attn in entries)

    def give_up(self) -> None:
        """Graphs that read this give NaN from now on."""
        with torch.inference_mode():
            self.shown.fill_(torch.nan)

    def renewal(self, prepare: Callable[[Any], Prepared]) -> list[tuple[Prepared, Prepared]]:
        """(held, new) for every call. prepare: makes the new one by its key.

        Raises: ValueError where the new one has no room in the memory of the held one.
        """
        pairs = []
        for key, held in self.calls:
            new = prepare(key)
            why = difference(held, new)
            if why is not None:
                raise ValueError(
                    f"a captured CUDA graph cannot take this: {why}. Call patch.refresh() and capture again (with the "
                    "longest prompt); until then the graph keeps what it has"
                )
            pairs.append((held, new))
        return pairs

    def rewrite(
        self, pairs: list[tuple[Prepared, Prepared]], rows: Rows | None, text: Tensor | None, cache: TextCache
    ) -> None:
        """Write a renewal where graphs read it; text: also keys and values of the text as it is now."""
        for old, new in pairs:
            rewrite(old, new)
        done: set[int] = set()
        for held in self.layers:
            layer, entry = held.layer, held.entry
            self._rename_maps(layer)
            if entry is None:
                continue
            if text is not None and id(entry) not in done:
                done.add(id(entry))
                with _modes(entry.key, held.autocast):
                    key, value = key_value(layer.attn, text)
                rewrite_tensors([entry.key, entry.value], [key, value])
                weights = Weights.of(*modules_of_text(layer.attn))
                if weights is not None:
                    weights.sample()
                    entry.weights = weights
            if held.served is not None:
                _rewrite_served(layer.attn, entry, held.served)
                entry.served, entry.bound = held.served, None
        self.rows = rows
        if text is not None:
            with torch.inference_mode():
                self.shown.copy_(text)
            self.no_room = None
            cache.renew(self.number, text, [held.entry for held in self.layers if held.entry is not None])

    def _rename_maps(self, layer: Layer) -> None:
        """Which entries of a layer's maps are prompts', where a graph of this text wrote them."""
        maps, prepared = self.maps.get(layer.name, (None, None))
        if maps is not None and prepared is not None and layer.captured is not None and layer.captured[0] is maps():
            layer.captured = (layer.captured[0], prepared.home.side.active, layer.captured[2])


def _rewrite_served(attn: Any, entry: KeyValue, served: Served) -> None:
    prepared = served.prepared
    with torch.inference_mode():
        rewrite_tensors([served.value_folded], [prepared.fold_value(entry.value)])
        for name, held in served.folds.items():
            new = fold_text(attn, name.split(",")[0], entry.key, entry.value, prepared)
            rewrite_tensors(held.tensors(), new.tensors())
            held.made.again()
    served.made.again()


@contextlib.contextmanager
def _modes(like: Tensor, autocast: torch.dtype | None) -> Iterator[None]:
    """As in the capture, without gradients."""
    on = {} if autocast is None else {"dtype": autocast}
    with (
        torch.inference_mode(like.is_inference()),
        torch.no_grad(),
        torch.autocast(like.device.type, enabled=autocast is not None, **on),  # type: ignore[arg-type]
    ):
        yield
