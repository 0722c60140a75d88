"""Captured maps: kept at the key layers alone, averaged over steps, brought from rows to pictures and words.

Source: the heat maps of DAAM (Tang et al. 2023, "What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
section 2): a word's map is the mean over heads, layers, steps and the word's tokens of the cross-attention
probabilities, each layer's upsampled bicubically. All of it is linear, so heads and steps are averaged first, at the
layer's own resolution. DAAM's code also clamps each head's upsampled map at 0, which its paper does not say.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..program import Capture
from ..streams import capturing

if TYPE_CHECKING:
    from .layers import Layer

__all__ = ["Maps", "WordMaps", "MapKeeper", "key_layers"]


class Maps(Mapping[str, Tensor]):
    """Layer name -> (B, T, height, width) float32, or (B, H, T, height, width) for ``Capture(reduce="none")``.

    B counts the active entries (the prompts, not the unconditional half). tokens: (T,) the indices captured. size:
    (height, width) of the latent.
    """

    def __init__(
        self, by_layer: Mapping[str, Tensor], tokens: Sequence[int], size: tuple[int, int] | None, tokenizer: Any = None
    ) -> None:
        self._by_layer = dict(by_layer)
        self.tokens = tuple(tokens)
        self.size = size
        self._tokenizer = tokenizer

    def __getitem__(self, layer: str) -> Tensor:
        return self._by_layer[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_layer)

    def __len__(self) -> int:
        return len(self._by_layer)

    def __repr__(self) -> str:
        return f"Maps({ {name: tuple(x.shape) for name, x in self._by_layer.items()} })"

    def upsample(self, size: tuple[int, int] | None = None) -> Tensor:
        """(B, T, height, width): the mean over layers, each upsampled bicubically to `size`, by default the latent's.

        Raises: ValueError (nothing captured yet, heads kept apart, a size below 1), TypeError (not two ints).
        """
        size = self._checked(size)
        total: Tensor | float = 0.0
        for maps in self._by_layer.values():
            total = total + F.interpolate(maps, size=size, mode="bicubic", align_corners=False)
        assert isinstance(total, Tensor)
        return total / len(self._by_layer)

    def per_word(self, prompt: str, size: tuple[int, int] | None = None) -> WordMaps:
        """The prompt's words, each the mean over its tokens. Words of which a token was not captured are left out.

        A word that comes again is called "word (2)". Raises: TypeError, ValueError, as `upsample`; ValueError also
        without a tokenizer (a UNet was patched and not a pipeline) or where no word was captured.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}")
        if self._tokenizer is None:
            raise ValueError("prompt: words need a tokenizer; apply to the pipeline, not to its UNet")
        place = {token: i for i, token in enumerate(self.tokens)}
        words = {
            word: [place[i] for i in indices]
            for word, indices in words_of(self._tokenizer, prompt).items()
            if all(i in place for i in indices)
        }
        if not words:
            raise ValueError(f"prompt: no word of {prompt!r} has all its tokens among the captured, {self.tokens}")
        maps = self.upsample(size)
        return WordMaps({word: maps[:, indices].mean(1) for word, indices in words.items()})

    def overlay(self, image: Any, prompt: str, alpha: float = 0.6) -> dict[str, Any]:
        """`WordMaps.overlay` of the prompt's words."""
        return self.per_word(prompt).overlay(image, alpha)

    def save(self, path: str | Path) -> None:
        """A safetensors file: each layer's maps by its name; tokens in the metadata. Needs safetensors."""
        _save(self._by_layer, path, {"tokens": ",".join(map(str, self.tokens))})

    def _checked(self, size: tuple[int, int] | None) -> tuple[int, int]:
        if not self._by_layer:
            raise ValueError("maps: nothing is captured yet; run the pipeline first")
        if any(maps.dim() != 4 for maps in self._by_layer.values()):
            raise ValueError("maps: heads were kept apart; capture with Capture(reduce='mean')")
        size = self.size if size is None else size
        if size is None:
            size = max(((m.shape[-2], m.shape[-1]) for m in self._by_layer.values()), key=lambda s: s[0] * s[1])
        return checked_size(size)


class WordMaps(Mapping[str, Tensor]):
    """Word -> (B, height, width) float32, in the prompt's order."""

    def __init__(self, by_word: Mapping[str, Tensor]) -> None:
        self._by_word = dict(by_word)

    def __getitem__(self, word: str) -> Tensor:
        return self._by_word[word]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_word)

    def __len__(self) -> int:
        return len(self._by_word)

    def __repr__(self) -> str:
        return f"WordMaps({ {word: tuple(x.shape) for word, x in self._by_word.items()} })"

    def upsample(self, size: tuple[int, int]) -> WordMaps:
        """The same words at another size, bicubically."""
        size = checked_size(size)
        return WordMaps(
            {
                word: F.interpolate(x[:, None], size=size, mode="bicubic", align_corners=False)[:, 0]
                for word, x in self._by_word.items()
            }
        )

    def overlay(self, image: Any, alpha: float = 0.6) -> dict[str, Any]:
        """Word -> a PIL image: the picture with the word's map over it, blue where it is lowest, red where highest.

        Args:
            image: a PIL image, or a list of B of them; with a list, the values are lists too.
            alpha: how much of the map, in [0, 1].

        Raises: TypeError, ValueError. Needs pillow and matplotlib.
        """
        import numpy as np
        from matplotlib import colormaps
        from PIL import Image

        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha: expected a number, got {type(alpha).__name__}")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        for one in images:
            if not isinstance(one, Image.Image):
                raise TypeError(f"image: expected a PIL image or a list of them, got {type(one).__name__}")
        count = len(next(iter(self._by_word.values()))) if self._by_word else 0
        if len(images) != count:
            raise ValueError(f"image: expected {count} images, one for each entry, got {len(images)}")
        shown: dict[str, Any] = {}
        for word, maps in self._by_word.items():
            pictures = []
            for one, heat in zip(images, maps.detach().float().cpu(), strict=True):
                heat = F.interpolate(heat[None, None], size=one.size[::-1], mode="bicubic", align_corners=False)[0, 0]
                heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
                colours = Image.fromarray((colormaps["turbo"](heat.numpy())[..., :3] * 255).astype(np.uint8))
                pictures.append(Image.blend(one.convert("RGB"), colours, float(alpha)))
            shown[word] = pictures if isinstance(image, (list, tuple)) else pictures[0]
        return shown

    def save(self, path: str | Path) -> None:
        """A safetensors file, each word's maps by the word. Needs safetensors."""
        _save(self._by_word, path, {})


class MapKeeper:
    """What a patch keeps of its layers' maps: which layers and steps, and the mean over a run's steps.

    A step's maps lie with their layers until the next step begins; here lie float32 sums of the active entries.
    """

    def __init__(self, capture: Capture, wanted: Iterable[str] | None) -> None:
        self.capture = capture
        self.wanted = None if wanted is None else set(wanted)
        self.size: tuple[int, int] | None = None
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._key: dict[tuple[int, int, int], set[str]] = {}

    def begin_step(self, model: nn.Module, layers: Sequence[Layer], x: Any, step: int, new_run: bool) -> None:
        """Before a model's forward: take in what the step before left, say which layers keep their maps in this one.
        new_run: what was taken in before is another picture's.

        Raises: RuntimeError while a CUDA graph is captured, where a mean over steps is wanted.
        """
        if self.capture.steps != "latest" and isinstance(x, Tensor) and capturing(x.device):
            raise RuntimeError(
                "capture: a CUDA graph is captured, and no Python runs between its replays to take a mean over steps; "
                "expected Capture(steps='latest'), whose maps are the latest replay's, or an eager step"
            )
        self._absorb(layers)
        if new_run:
            for layer in layers:
                self._sums.pop(layer.name, None)
        names = self._layers(model, layers, x)
        wanted = self.capture.steps
        now = wanted is None or wanted == "latest" or step in wanted
        for layer in layers:
            layer.captures = now and layer.name in names

    def read(self, layers: Sequence[Layer], tokens_of: Any) -> Maps:
        """The mean of the run so far; where gradients are on, the latest step, as part of the graph."""
        found, count = {}, 0
        for layer in layers:
            latest = _picture(layer)
            total, steps = self._sums.get(layer.name, (None, 0))
            if latest is None:
                latest = None if total is None else total / steps
            elif total is not None and not latest.requires_grad and self._adds_up(total, latest):
                latest = (total + latest) / (steps + 1)
            if latest is not None:
                found[layer.name] = latest
                count = max(count, latest.shape[-3])
        tokens = tuple(range(count)) if self.capture.tokens is None else self.capture.tokens
        return Maps(found, tokens, self.size, tokens_of)

    @contextlib.contextmanager
    def aside(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Inside, a forward that is not the run's: its maps are kept whatever the step, and leave with it."""
        self._absorb(layers)
        sums, capture = dict(self._sums), self.capture
        self.capture = replace(capture, steps="latest")
        self._sums = {}
        try:
            yield
        finally:
            for layer in layers:
                layer.captured = None
            self._sums, self.capture = sums, capture

    def _absorb(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            latest = _picture(layer)
            layer.captured = None
            if latest is None:
                continue
            total, steps = self._sums.get(layer.name, (None, 0))
            latest = latest.detach()
            if total is not None and self._adds_up(total, latest):
                # Not in place: somebody may hold what `read` gave.
                self._sums[layer.name] = (total + latest, steps + 1)
            else:
                self._sums[layer.name] = (latest, 1)

    def _adds_up(self, total: Tensor, latest: Tensor) -> bool:
        """Whether a step's maps are one more of the same picture's."""
        return total.shape == latest.shape and self.capture.steps != "latest"

    def _layers(self, model: nn.Module, layers: Sequence[Layer], x: Any) -> set[str]:
        if isinstance(x, Tensor) and x.dim() >= 4:
            self.size = (int(x.shape[-2]), int(x.shape[-1]))
        if self.wanted is not None:
            return self.wanted
        key = (id(model), *(self.size or (0, 0)))
        if key not in self._key:
            self._key[key] = key_layers(model, layers, self.size)
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


def words_of(tokenizer: Any, prompt: str) -> dict[str, list[int]]:
    """The prompt's words -> their token indices, for CLIP's tokenizers, whose last piece of a word ends in "</w>"."""
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    special = set(tokenizer.all_special_ids)
    words: dict[str, list[int]] = {}
    begun, indices = "", []
    for i, (token, piece) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)):
        if token in special:
            continue
        begun += piece.removesuffix("</w>")
        indices.append(i)
        if not piece.endswith("</w>"):
            continue
        name, again = begun, 2
        while name in words:
            name, again = f"{begun} ({again})", again + 1
        words[name] = indices
        begun, indices = "", []
    if indices:
        words[begun] = indices
    return words


def checked_size(size: Any) -> tuple[int, int]:
    """(height, width), two ints >= 1. Raises: TypeError, ValueError."""
    if not isinstance(size, Sequence) or len(size) != 2 or any(isinstance(s, bool) for s in size):
        raise TypeError(f"size: expected (height, width), got {size!r}")
    if not all(isinstance(s, int) for s in size):
        raise TypeError(f"size: expected two ints, got {size!r}")
    if min(size) < 1:
        raise ValueError(f"size: expected at least 1 by 1, got {tuple(size)}")
    return size[0], size[1]


def _picture(layer: Layer) -> Tensor | None:
    """A layer's latest maps of the active entries, (B, T, height, width) or (B, H, T, height, width)."""
    if layer.captured is None:
        return None
    maps, active, grid = layer.captured
    if grid is None:
        raise ValueError(f"maps: layer {layer.name!r} ran outside a block that knows its height and width")
    return _entries(maps, active).unflatten(-1, grid)


def _entries(maps: Tensor, active: Tensor | None) -> Tensor:
    """Those that a bool (B,) on the CPU names; by slices, since an index would be sent to the maps' device."""
    if active is None:
        return maps
    chosen = active.nonzero()[:, 0].tolist()
    if chosen and chosen[-1] - chosen[0] + 1 == len(chosen):
        return maps[chosen[0] : chosen[-1] + 1]
    return torch.stack([maps[i] for i in chosen]) if chosen else maps[:0]


def _save(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, str(path), metadata)
