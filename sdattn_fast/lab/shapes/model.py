"""What the shapes pipeline has of its own: its tokenizer and its UNet, before any training. The rest is `parts`'."""

from __future__ import annotations

from typing import Any

from ..parts import LATENT_SIDE, TEXT_WIDTH
from ..tokenizer import byte_pair_tokenizer
from .world import sample_scene

__all__ = ["build_tokenizer", "build_unet"]


def build_tokenizer() -> Any:
    """A CLIPTokenizer learnt on captions.

    The vocabulary is kept so small that some words of the world stay in two pieces, as long words do in the real one.
    """
    captions = (sample_scene(seed).caption for seed in range(2000))
    return byte_pair_tokenizer(captions, 640, split=("background", "triangle"))


def build_unet() -> Any:
    """UNet2DConditionModel: cross-attention at 16x16, 8x8 and in the middle, four heads."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE, block_out_channels=(64, 96, 128), layers_per_block=1, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip
