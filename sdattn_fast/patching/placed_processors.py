"""The patch's processors in the layers of a model: how they get there, stay there, and leave."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .ip_adapter import ip_adapter_processor, is_ip_adapter
from .known_processors import own_class, why_foreign
from .layers import LAYER, Layer
from .own_attention import OwnAttnProcessor, SemanticLTXAttnProcessor, SemanticWanAttnProcessor
from .processor import SemanticAttnProcessor
from .settings import Settings

__all__ = ["PlacedProcessors"]


class PlacedProcessors:
    """One processor for all layers, since torch.compile guards on it; layers with an IP-Adapter have their own."""

    def __init__(self, settings: Settings) -> None:
        self._processor = SemanticAttnProcessor(
            settings.program, inactive_heads=settings.inactive_heads, fold=settings.fold,
            text_cache=settings.text_cache, backend=settings.backend,
        )  # fmt: skip
        self._warned: set[str] = set()

    def place(self, layer: Layer) -> None:
        """Replace a layer's processor."""
        setattr(layer.attn, LAYER, layer)
        layer.original = layer.attn.processor
        if is_ip_adapter(layer.original):
            layer.placed = ip_adapter_processor(self._processor, layer.original)
        elif (own := own_class(layer.attn)) is not None:
            layer.placed = _OF_OWN_CLASS[own](self._processor, layer.original)
        else:
            layer.placed = self._processor
            self._processor.in_place_of = layer.original
        layer.attn.set_processor(layer.placed)

    def remove(self, layer: Layer) -> None:
        """Put the original back, unless another processor has replaced ours."""
        if layer.attn.processor is layer.placed:
            layer.attn.set_processor(layer.original)
        layer.placed = None
        if getattr(layer.attn, LAYER, None) is layer:
            delattr(layer.attn, LAYER)

    def keep(self, layers: Sequence[Layer]) -> None:
        """Place processors again that an IP-Adapter replaced when it was loaded or unloaded. Others that replaced ours
        may be intended: they stay, with a warning."""
        foreign = []
        for layer in layers:
            now = layer.attn.processor
            if now is layer.placed:
                continue
            unloaded = is_ip_adapter(layer.placed) and why_foreign(layer.attn) is None
            if is_ip_adapter(now) or unloaded:
                self.place(layer)
            elif type(now) is SemanticAttnProcessor:
                layer.attn.set_processor(layer.placed)
            elif layer.name not in self._warned:
                foreign.append((layer.name, type(now).__name__))
        if foreign:
            self._warned.update(name for name, _ in foreign)
            warnings.warn(
                f"sdattn_fast: {len(foreign)} of {len(layers)} layers run another processor, set over the patch's "
                f"({foreign[0][0]!r}: {foreign[0][1]}); the program does not run there. To have it back, remove() and "
                "apply again",
                UserWarning,
                stacklevel=2,
            )


_OF_OWN_CLASS: dict[str, type[OwnAttnProcessor]] = {"wan": SemanticWanAttnProcessor, "ltx": SemanticLTXAttnProcessor}
