"""Captured maps: kept at the key layers alone, averaged over steps, brought from rows to pictures and words.

Source: the heat maps of DAAM (Tang et al. 2023, "What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
section 2): a word's map is the mean over heads, layers, steps and the word's tokens of the cross-attention
probabilities, each layer's upsampled bicubically. All of it is linear, so heads and steps are averaged first, at the
layer's own resolution. DAAM's code also clamps each head's upsampled map at 0, which its paper does not say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .words import ByWord, words_of

__all__ = ["Maps", "WordMaps"]


class Maps(Mapping[str, Tensor]):
    """Attention maps by layer, a mapping: what `Patch.maps` and `guidance.gradcam` give.

    The values are (B, T, height, width) float32 tensors, or (B, H, T, height, width) for ``Capture(reduce="none")``. B
    counts the active entries: the prompts, without the unconditional entries. Of a video there are frames before height
    and width, here and in all that is made of these maps.

    Attributes:
        tokens: The T indices of the tokens whose maps these are.
        size: (height, width) of the latent. None: not known.

    Examples:
        >>> with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        ...     image = pipe("a red car").images[0]
        ...     maps = patch.maps
        >>> maps.overlay(image, "a red car")["car"].save("car.png")
        >>> maps.upsample((64, 64)).shape
        torch.Size([1, 77, 64, 64])
        >>> maps.save("maps.safetensors")

    Source: DAAM, Tang et al. 2023, "What the DAAM", section 2, arXiv 2210.04885.
    """

    def __init__(
        self, by_layer: Mapping[str, Tensor], tokens: Sequence[int], size: tuple[int, int] | None,
        tokenizer: Any = None, by_head: bool = False,
    ) -> None:  # fmt: skip
        self._by_layer = dict(by_layer)
        self.tokens = tuple(tokens)
        self.size = size
        self._tokenizer = tokenizer
        self._by_head = by_head

    def __getitem__(self, layer: str) -> Tensor:
        return self._by_layer[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_layer)

    def __len__(self) -> int:
        return len(self._by_layer)

    def __repr__(self) -> str:
        return f"Maps({ {name: tuple(x.shape) for name, x in self._by_layer.items()} })"

    def upsample(self, size: tuple[int, int] | None = None, tokens: Sequence[int] | None = None) -> Tensor:
        """The mean over layers, each upsampled bicubically.

        Args:
            size: (height, width) of the result. None: that of the latent.
            tokens: Indices of tokens whose maps to give, in this order. None: all of `self.tokens`.

        Returns:
            A (B, T, height, width) float32 tensor.

        Raises:
            TypeError: If `size` is not two ints.
            ValueError: If nothing is captured yet, heads were kept apart, a size is below 1, or a token was not
                captured.
        """
        size = self._checked(size)
        if tokens is not None and not set(tokens) <= set(self.tokens):
            raise ValueError(f"tokens: expected some of {self.tokens}, which were captured, got {tuple(tokens)}")
        chosen = None if tokens is None else [self.tokens.index(token) for token in tokens]
        total: Tensor | float = 0.0
        for maps in self._by_layer.values():
            total = total + _resized(maps if chosen is None else maps[:, chosen], size)
        assert isinstance(total, Tensor)
        return total / len(self._by_layer)

    def per_word(self, prompt: str, size: tuple[int, int] | None = None, tokens: int | None = None) -> WordMaps:
        """The map of each word: the mean over layers and over the word's tokens.

        Words are separated by white space and have no punctuation; the second "car" is "car (2)". Words of which a
        token was cut off or not captured are left out.

        Args:
            prompt: The text that was tokenised, without the weights that compel and lpw take out.
            size: (height, width) of the maps. None: that of the latent.
            tokens: How many tokens the text had, such as 154 in two chunks of 77. None: found from the captured tokens.

        Returns:
            The words in the prompt's order, each with a (B, height, width) float32 tensor.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: In the cases of `upsample`, or if there is no tokenizer, no word was captured, or `tokens` fits
                no chunks.

        Examples:
            >>> red = maps.per_word("a red car")["red"]  # (B, height, width)
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}")
        if self._tokenizer is None:
            raise ValueError(
                "prompt: words need a tokenizer, and none is known; expected apply(...) of a pipeline that has one"
            )
        size = self._checked(size)
        place = {token: i for i, token in enumerate(self.tokens)}
        length = self._text_length() if tokens is None else tokens
        words = {
            word: [place[i] for i in indices]
            for word, indices in words_of(self._tokenizer, prompt, length).items()
            if all(i in place for i in indices)
        }
        if not words:
            raise ValueError(f"prompt: no word of {prompt!r} has all its tokens among the captured, {self.tokens}")
        maps = self.upsample(size)
        return WordMaps({word: maps[:, indices].mean(1) for word, indices in words.items()})

    def overlay(self, image: Any, prompt: str, alpha: float = 0.6, tokens: int | None = None) -> ByWord[Any]:
        """`WordMaps.overlay` of the words that `per_word` finds.

        Args:
            image: A PIL image, or a list of B of them.
            prompt: The text that was tokenised.
            alpha: Weight of the map in the picture, in [0, 1].
            tokens: As in `per_word`.

        Returns:
            The words, each with a PIL image, or with a list of them if `image` is one.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: In the cases of `per_word`, or if there are not B images.
        """
        return self.per_word(prompt, tokens=tokens).overlay(image, alpha)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: each layer's maps under its name, and the tokens in the metadata.

        Args:
            path: Path of the file.

        Raises:
            ImportError: If safetensors is missing.
        """
        _save(self._by_layer, path, {"tokens": ",".join(map(str, self.tokens))})

    def _text_length(self) -> int | None:
        """How many tokens the text had, where the captured say so; None: no more than the tokenizer's length."""
        length, reached = int(self._tokenizer.model_max_length), max(self.tokens, default=-1) + 1
        if reached <= length:
            return None
        whole = self.tokens == tuple(range(reached))
        return reached if whole else -(-reached // length) * length

    def _checked(self, size: tuple[int, int] | None) -> tuple[int, int]:
        if not self._by_layer:
            raise ValueError("maps: nothing is captured yet; run the pipeline first")
        if self._by_head:
            raise ValueError("maps: heads were kept apart; capture with Capture(reduce='mean')")
        size = self.size if size is None else size
        if size is None:
            size = max(((m.shape[-2], m.shape[-1]) for m in self._by_layer.values()), key=lambda s: s[0] * s[1])
        return checked_size(size)


class WordMaps(ByWord[Tensor]):
    """Maps by word, a mapping: what `Maps.per_word` gives. The values are (B, height, width) float32 tensors.

    Words are in the prompt's order, and are found in upper or lower case. A missing word raises a KeyError that lists
    the words.

    Examples:
        >>> words = maps.per_word("a red car")
        >>> words.upsample((512, 512))["car"].shape
        torch.Size([1, 512, 512])
        >>> words.overlay(image)["car"].save("car.png")
        >>> words.save("words.safetensors")
    """

    def __repr__(self) -> str:
        return f"WordMaps({ {word: tuple(x.shape) for word, x in self.items()} })"

    def upsample(self, size: tuple[int, int]) -> WordMaps:
        """The same words at another size, bicubically.

        Args:
            size: (height, width).

        Returns:
            The words, each with a (B, height, width) float32 tensor.

        Raises:
            TypeError: If `size` is not two ints.
            ValueError: If a size is below 1.
        """
        size = checked_size(size)
        return WordMaps({word: _resized(x, size) for word, x in self.items()})

    def overlay(self, image: Any, alpha: float = 0.6) -> ByWord[Any]:
        """Each word's map over the picture, blue where it is lowest and red where it is highest.

        Args:
            image: A PIL image, or a list of B of them.
            alpha: Weight of the map in the picture, in [0, 1].

        Returns:
            The words, each with a PIL image, or with a list of them if `image` is one.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If `alpha` is out of range, or there are not B images.
            ImportError: If pillow or matplotlib is missing.
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
        count = next(iter(self.values())).shape[:-2].numel() if self else 0
        if len(images) != count:
            raise ValueError(f"image: expected {count} images, one for each entry or frame, got {len(images)}")
        shown: dict[str, Any] = {}
        for word, maps in self.items():
            pictures = []
            for one, heat in zip(images, maps.detach().float().cpu().flatten(0, -3), strict=True):
                heat = _resized(heat[None], one.size[::-1])[0]
                heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
                colours = Image.fromarray((colormaps["turbo"](heat.numpy())[..., :3] * 255).astype(np.uint8))
                pictures.append(Image.blend(one.convert("RGB"), colours, float(alpha)))
            shown[word] = pictures if isinstance(image, (list, tuple)) else pictures[0]
        return ByWord(shown)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: each word's maps under the word.

        Args:
            path: Path of the file.

        Raises:
            ImportError: If safetensors is missing.
        """
        _save(self, path, {})


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., height, width) at another size, bicubically."""
    flat = maps.reshape(len(maps), -1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bicubic", align_corners=False).view(*maps.shape[:-2], *size)


def checked_size(size: Any) -> tuple[int, int]:
    """(height, width), two ints >= 1. Raises: TypeError, ValueError."""
    if not isinstance(size, Sequence) or len(size) != 2 or any(isinstance(s, bool) for s in size):
        raise TypeError(f"size: expected (height, width), got {size!r}")
    if not all(isinstance(s, int) for s in size):
        raise TypeError(f"size: expected two ints, got {size!r}")
    if min(size) < 1:
        raise ValueError(f"size: expected at least 1 by 1, got {tuple(size)}")
    return size[0], size[1]


def _save(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, str(path), metadata)
