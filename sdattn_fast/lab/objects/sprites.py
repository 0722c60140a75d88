"""The pictograms that scenes are made of: forty nouns of Microsoft's Fluent Emoji, some in any of six colours."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["COLOURED", "HUES", "NOUNS", "PLAIN", "SPRITE_SIDE", "dominant_hue", "plural", "sprite"]

SPRITE_SIDE = 64
HUES = {"red": 0, "yellow": 50, "green": 125, "blue": 215, "purple": 270, "pink": 322}
"""Colour names and their hues in degrees."""

COLOURED = (
    "apple", "car", "balloon", "book", "star", "heart", "bird", "shirt", "dress", "cap", "boot", "backpack",
    "umbrella", "bell",
)  # fmt: skip
"""Nouns that are drawn in any colour of `HUES`."""

PLAIN = (
    "banana", "pineapple", "mushroom", "carrot", "hamburger", "pizza", "fire engine", "sailboat", "airplane",
    "rocket", "house", "castle", "teddy bear", "light bulb", "snowman", "cactus", "pine tree", "cat", "elephant",
    "penguin", "owl", "frog", "turtle", "whale", "soccer ball", "robot",
)  # fmt: skip
"""Nouns that have one look, and no colour word in a caption."""

NOUNS = COLOURED + PLAIN
"""In the order of the atlas, eight a row."""

_COLUMNS = 8
_PLURALS = {"dress": "dresses", "cactus": "cactuses"}


def plural(noun: str) -> str:
    """ "two apples": the noun in the plural."""
    return _PLURALS.get(noun, noun + "s")


@cache
def sprite(noun: str, colour: str | None = None) -> Image.Image:
    """A pictogram, RGBA of `SPRITE_SIDE` x `SPRITE_SIDE`, with the alpha of the original.

    Args:
        noun: of `NOUNS`.
        colour: of `HUES`, for nouns of `COLOURED`; None: as the original has it.

    Raises:
        ValueError: no such noun or colour, or a colour for a noun that has one look.
    """
    if noun not in NOUNS:
        raise ValueError(f"noun: expected one of {', '.join(NOUNS)}, got {noun!r}")
    index = NOUNS.index(noun)
    x, y = index % _COLUMNS * SPRITE_SIDE, index // _COLUMNS * SPRITE_SIDE
    original = _atlas().crop((x, y, x + SPRITE_SIDE, y + SPRITE_SIDE))
    if colour is None:
        return original
    if colour not in HUES or noun not in COLOURED:
        raise ValueError(
            f"colour: expected None or, for {', '.join(COLOURED)}, one of {', '.join(HUES)}, got {colour!r}"
        )
    return _recoloured(original, HUES[colour])


def dominant_hue(pixels: np.ndarray) -> float | None:
    """The hue in degrees, [0, 360), in which most of the saturated pixels are, None where hardly any is saturated.

    pixels: (n, 3) uint8 RGB.
    """
    if not len(pixels):
        return None
    hue, saturation, value = _hsv(np.asarray(pixels)[None])[0].T
    weight = saturation * value * ((saturation > 0.25) & (value > 0.2))
    if weight.sum() < 0.05 * len(pixels):
        return None
    histogram = np.bincount((hue // 10).astype(int) % 36, weight, minlength=36)
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    peak = int(smooth.argmax())
    near = np.abs((hue - peak * 10 - 5 + 180) % 360 - 180) <= 15
    turned = np.deg2rad(hue[near])
    angle = np.arctan2((weight[near] * np.sin(turned)).sum(), (weight[near] * np.cos(turned)).sum())
    return float(np.rad2deg(angle) % 360)


def _recoloured(original: Image.Image, hue: float) -> Image.Image:
    """The pixels of the dominant hue, and those near to it, turned to the new one; the others (a tree's stem, an
    apple's leaf) stay."""
    pixels = np.asarray(original)
    solid = pixels[..., 3] >= 128
    main = dominant_hue(pixels[solid][:, :3])
    assert main is not None
    hsv = _hsv(pixels[..., :3])
    away = (hsv[..., 0] - main + 180) % 360 - 180
    turned = (np.abs(away) < 60) & (hsv[..., 1] > 0.15)
    new = hsv.copy()
    new[..., 0] = np.where(turned, (hue + 0.35 * away) % 360, hsv[..., 0])
    new[..., 1] = np.where(turned, np.clip(0.25 + 0.75 * hsv[..., 1], 0, 1), hsv[..., 1])
    new[..., 2] = np.where(turned, np.clip(0.3 + 0.7 * hsv[..., 2], 0, 1), hsv[..., 2])
    return Image.fromarray(np.concatenate([_rgb(new), pixels[..., 3:]], -1))


def _hsv(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 to hue in degrees, saturation and value in [0, 1]."""
    from skimage.color import rgb2hsv

    return rgb2hsv(rgb) * np.array([360.0, 1.0, 1.0])


def _rgb(hsv: np.ndarray) -> np.ndarray:
    from skimage.color import hsv2rgb

    return np.rint(hsv2rgb(hsv / np.array([360.0, 1.0, 1.0])) * 255).astype(np.uint8)


@cache
def _atlas() -> Image.Image:
    with Image.open(Path(__file__).parent / "sprites.png") as atlas:
        return atlas.convert("RGBA")
