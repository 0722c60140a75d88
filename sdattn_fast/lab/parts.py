"""The parts that the lab's pipelines have in common: what each is built of, before any training.

Their tokenizers and the channels of their UNets differ: `shapes.model` and `objects.model`.
"""

from __future__ import annotations

from typing import Any

from .tokenizer import MAX_TOKENS

__all__ = ["build_clip", "build_scheduler", "build_text_encoder", "build_unet", "build_vae"]

SIDE, TEXT_WIDTH = 64, 128
LATENT_SIDE = SIDE // 4


def build_text_encoder(tokenizer: Any) -> Any:
    """CLIPTextModel, two layers of width 128."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_text_config(tokenizer))


def build_clip(tokenizer: Any) -> Any:
    """CLIPModel: the text encoder above and a vision tower of three layers on 8x8 patches."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=8, projection_dim=TEXT_WIDTH,
    )  # fmt: skip
    text = _text_config(tokenizer)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


def build_vae() -> Any:
    """AutoencoderKL: 64x64 RGB to 4 channels of 16x16."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=16,
        sample_size=SIDE,
    )  # fmt: skip


def build_unet(channels: tuple[int, int, int]) -> Any:
    """UNet2DConditionModel: cross-attention at 16x16, 8x8 and, in the middle, 4x4, with four heads. channels: at 16x16,
    8x8 and 4x4."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE, block_out_channels=channels, layers_per_block=1, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip


def build_scheduler() -> Any:
    """DDIM with Stable Diffusion's noise schedule, rescaled to end in pure noise, and velocity prediction.

    With the schedule as it was, the last step still shows the picture's mean; the model learns to read it there, and
    sampling, which starts from noise, gives every picture a middling background (Lin et al. 2023, "Common Diffusion
    Noise Schedules and Sample Steps are Flawed"). A flat background is half of what a caption here asks for.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        steps_offset=1,
    )  # fmt: skip


def _text_config(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
