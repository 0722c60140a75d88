"""What the objects pipeline has of its own: its tokenizer and its UNet's channels. The rest is `parts`'."""

from __future__ import annotations

from typing import Any

from ..tokenizer import byte_pair_tokenizer
from .sprites import HUES, NOUNS, plural
from .world import BACKGROUNDS, NUMBERS, sample_scene

__all__ = ["CHANNELS", "build_tokenizer"]

CHANNELS = (64, 128, 192)


def build_tokenizer() -> Any:
    """A CLIPTokenizer learnt on names and captions; "background", "umbrella" and "pineapple" stay in several pieces."""
    names = [*NOUNS, *map(plural, NOUNS), *HUES, *BACKGROUNDS, *NUMBERS.values()]
    captions = [*(name for name in names for _ in range(20)), *(sample_scene(seed).caption for seed in range(300))]
    return byte_pair_tokenizer(captions, 900, split=("background", "umbrella", "pineapple"))
