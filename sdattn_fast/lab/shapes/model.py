"""What the shapes pipeline has of its own: its tokenizer and its UNet's channels. The rest is `parts`'."""

from __future__ import annotations

from typing import Any

from ..tokenizer import byte_pair_tokenizer
from .world import sample_scene

__all__ = ["CHANNELS", "build_tokenizer"]

CHANNELS = (64, 96, 128)


def build_tokenizer() -> Any:
    """A CLIPTokenizer learnt on captions.

    The vocabulary is kept so small that some words of the world stay in two pieces, as long words do in the real one.
    """
    captions = (sample_scene(seed).caption for seed in range(2000))
    return byte_pair_tokenizer(captions, 640, split=("background", "triangle"))
