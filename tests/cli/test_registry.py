"""The registry's layers are those of the UNets that diffusers builds from the same configuration."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdattn_fast.cli.registry import UNET_CONFIGS, UNET_LAYERS


@pytest.mark.parametrize("name", list(UNET_LAYERS))
def test_layers(name):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIGS[name])
    side = UNET_CONFIGS[name]["sample_size"]
    blocks = len(UNET_CONFIGS[name]["block_out_channels"])
    counts = Counter()
    for path, module in unet.named_modules():
        if not path.endswith("attn2"):
            continue
        part, number, *_ = path.split(".")
        level = {"down_blocks": int(number) if number.isdigit() else 0, "mid_block": blocks - 1}.get(part)
        if level is None:
            level = blocks - 1 - int(number)
        counts[side // 2**level, module.heads, module.inner_dim // module.heads] += 1
    assert counts == {(layer.height, layer.num_heads, layer.head_dim): layer.count for layer in UNET_LAYERS[name]}
