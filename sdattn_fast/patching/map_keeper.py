"""Which maps a patch keeps: of which layers, in which steps, of which of a step's forwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..program import Capture
from ..streams import capturing
from .call import draws_in_windows
from .layers import select_layers
from .maps import Maps

if TYPE_CHECKING:
    from .call import Call
    from .layers import Layer
    from .text_state import TextState

__all__ = ["MapKeeper", "key_layers"]


class MapKeeper:
    """The maps themselves are a call's (`MapSums`). wanted: names of layers, None for the key layers."""

    def __init__(self, capture: Capture, wanted: Iterable[str] | None) -> None:
        self.capture = capture
        self.wanted = None if wanted is None else set(wanted)
        self._key: dict[tuple[int, int, int], set[str]] = {}

    def begin(
        self,
        call: Call,
        begins: bool,
        model: nn.Module,
        layers: Sequence[Layer],
        x: Any,
        prompts: tuple[int, ...] | None,
    ) -> None:
        """Before a model's forward: say which layers keep their maps in it. begins: it is the first of a step. prompts:
        of its active entries; None where they are not known.

        A pipeline may ask its prompts twice in a step, as self-attention guidance does; the first time counts.

        Raises: RuntimeError while a CUDA graph is captured, where a mean over steps is wanted. ValueError where a
        pipeline draws a picture in windows or asks other prompts in the same step, or no captured layer is of those
        that the call wants.
        """
        if self.capture.steps != "latest" and isinstance(x, Tensor) and capturing(x.device):
            raise RuntimeError(
                "capture: a CUDA graph is captured, and no Python runs between its replays to take a mean over steps; "
                "expected Capture(steps='latest'), whose maps are the latest replay's, or an eager step"
            )
        if draws_in_windows(call.pipe):
            kind = type(call.pipe).__name__
            raise ValueError(f"capture: maps are of whole pictures; {kind} draws them in windows; expected None")
        maps, steps = call.maps, self.capture.steps
        if begins:
            maps.add_latest(mean=steps != "latest")
        names = self._layers(call, model, layers, x)
        if call.maps_of is not None:
            names = set(select_layers(call.maps_of, sorted(names), "layers, of the captured ones"))
        now = call.aside or steps is None or steps == "latest" or call.steps.index in steps
        if prompts is not None and not prompts:
            now = False
        elif now and call.pipe is not None and any(one.name in maps.latest for one in layers if one.name in names):
            if prompts != maps.prompts:
                raise ValueError(
                    f"capture: {type(call.pipe).__name__} asked for prompts {list(maps.prompts or ())} and then for "
                    f"{list(prompts or ())} in one step; maps need a step's prompts in one forward"
                )
            now = False
        if now:
            maps.prompts = prompts
        for layer in layers:
            layer.captured = None
            layer.captures = now and layer.name in names
            layer.ends_forward = layer.captures and call.ends_with_maps

    def end(self, call: Call, text: TextState, layers: Sequence[Layer]) -> None:
        """After a model's forward: its maps are the call's."""
        for layer in layers:
            layer.ends_forward = False  # of this forward alone: a layer may be called by itself, or again in a backward
            if layer.captured is not None:
                maps, active, grid = layer.captured
                call.maps.latest[layer.name] = maps, text.pictures(active), grid
                layer.captured = None

    def read(self, call: Call, names: Iterable[str], tokenizer: Any) -> Maps:
        """A call's, so far."""
        found = call.maps.read(names, mean=self.capture.steps != "latest")
        by_head = self.capture.reduce == "none"
        count = max((maps.shape[2 if by_head else 1] for maps in found.values()), default=0)
        tokens = tuple(range(count)) if self.capture.tokens is None else self.capture.tokens
        return Maps(found, tokens, call.maps.size, tokenizer, by_head)

    def _layers(self, call: Call, model: nn.Module, layers: Sequence[Layer], x: Any) -> set[str]:
        size = call.maps.size
        if isinstance(x, Tensor) and x.dim() >= 4:
            call.maps.size = size = int(x.shape[-2]), int(x.shape[-1])
        if self.wanted is not None:
            return self.wanted
        key = (id(model), *(size or (0, 0)))
        if key not in self._key:
            self._key[key] = key_layers(model, layers, size)
        return self._key[key]


def key_layers(model: nn.Module, layers: Sequence[Layer], size: tuple[int, int] | None) -> set[str]:
    """The layers whose maps show objects: the level nearest to a quarter of the latent's side, but not below 16 pixels.

    16x16 for SD 1.5 at 512x512, 32x32 for SDXL at 1024x1024. size: (height, width) of the latent; None, and models
    without levels: all layers.
    """
    levels = _levels(model, layers)
    if size is None or not levels:
        return {layer.name for layer in layers}
    side = math.sqrt(size[0] * size[1])
    target = max(side / 4, 16.0)
    nearest = min(set(levels.values()), key=lambda stride: (abs(math.log(side / stride / target)), -stride))
    return {name for name, stride in levels.items() if stride == nearest}


def _levels(model: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """Layer name -> how many pixels of the latent one of its pixels spans, counted along the model's samplers."""
    mine = {id(layer.attn): layer.name for layer in layers}
    found: dict[str, int] = {}
    stride = 1

    def mark(block: Any) -> None:
        found.update({mine[id(m)]: stride for m in block.modules() if id(m) in mine})

    for block in getattr(model, "down_blocks", None) or ():
        mark(block)
        stride *= 2 if getattr(block, "downsamplers", None) else 1
    if getattr(model, "mid_block", None) is not None:
        mark(model.mid_block)
    for block in getattr(model, "up_blocks", None) or ():
        mark(block)
        stride = max(1, stride // 2) if getattr(block, "upsamplers", None) else stride
    return found
