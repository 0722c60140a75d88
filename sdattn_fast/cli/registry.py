"""The UNet registry: the cross-attention layers of the models people run, for benchmarks and reports.

Geometry as in the models' published `unet/config.json`; latents are an eighth of the picture's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LayerShape", "UNET_CONFIGS", "UNET_LAYERS", "build_random_unet", "random_inputs", "twin_of"]


@dataclass(frozen=True)
class LayerShape:
    """One kind of cross-attention layer: how many there are, the grid they see, and their heads."""

    count: int
    height: int
    width: int
    num_heads: int
    head_dim: int

    @property
    def pixels(self) -> int:
        return self.height * self.width


UNET_LAYERS: dict[str, tuple[LayerShape, ...]] = {
    "sd15": (
        LayerShape(5, 64, 64, 8, 40),
        LayerShape(5, 32, 32, 8, 80),
        LayerShape(5, 16, 16, 8, 160),
        LayerShape(1, 8, 8, 8, 160),
    ),
    "sd21": (
        LayerShape(5, 96, 96, 5, 64),
        LayerShape(5, 48, 48, 10, 64),
        LayerShape(5, 24, 24, 20, 64),
        LayerShape(1, 12, 12, 20, 64),
    ),
    "sdxl": (
        LayerShape(10, 64, 64, 10, 64),
        LayerShape(60, 32, 32, 20, 64),
    ),
}

_SD1_BLOCKS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
}

UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, **_SD1_BLOCKS},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        **_SD1_BLOCKS,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def build_random_unet(name: str, dtype: Any = None, device: Any = "cpu") -> Any:
    """The UNet of that name, true geometry, random weights, in eval mode. Needs diffusers."""
    import torch
    from diffusers import UNet2DConditionModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with torch.device(device):
            unet: Any = UNet2DConditionModel(**UNET_CONFIGS[name])
            return unet.eval()
    finally:
        torch.set_default_dtype(default)


def twin_of(unet: Any) -> Any:
    """Another UNet on the same weights, so that a patched one and a stock one can take turns."""
    import torch

    with torch.device("meta"):
        twin = type(unet)(**unet.config)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.eval()


def random_inputs(config: Any, batch: int, dtype: Any, device: Any = "cpu") -> dict[str, Any]:
    """Random keyword arguments for the forward of a UNet of that config: latents, a timestep, 77 tokens of text."""
    import torch

    side, channels = config["sample_size"], config.get("in_channels", 4)
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, channels, side, side, dtype=dtype, device=device),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, config["cross_attention_dim"], dtype=dtype, device=device),
    }
    if config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 1280, dtype=dtype, device=device),
            "time_ids": torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * batch, dtype=dtype, device=device),
        }
    return inputs
