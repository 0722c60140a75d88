"""What the objects pipeline has of its own: its tokenizer and its UNet, before any training. The rest is `parts`'."""

from __future__ import annotations

from typing import Any

from ..parts import LATENT_SIDE, TEXT_WIDTH
from ..tokenizer import byte_pair_tokenizer
from .sprites import HUES, NOUNS, plural
from .world import BACKGROUNDS, NUMBERS, sample_scene

__all__ = ["build_tokenizer", "build_unet"]


def build_tokenizer() -> Any:
    """A CLIPTokenizer learnt on names and captions; "background", "umbrella" and "pineapple" stay in several pieces."""
    names = [*NOUNS, *map(plural, NOUNS), *HUES, *BACKGROUNDS, *NUMBERS.values()]
    captions = [*(name for name in names for _ in range(20)), *(sample_scene(seed).caption for seed in range(300))]
    return byte_pair_tokenizer(captions, 900, split=("background", "umbrella", "pineapple"))


def build_unet() -> Any:
    """UNet2DConditionModel: cross-attention at 16x16, 8x8 and, in the middle, 4x4; four heads."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE, block_out_channels=(64, 128, 192), layers_per_block=1, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip
