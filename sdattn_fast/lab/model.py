"""The parts of the shapes pipeline: what each is built of, before any training."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

from .world import SIDE, sample_scene

__all__ = ["build_clip", "build_scheduler", "build_text_encoder", "build_tokenizer", "build_unet", "build_vae"]

LATENT_SIDE, TEXT_WIDTH, POSITIONS, VOCABULARY = SIDE // 4, 128, 77, 640


def build_tokenizer() -> Any:
    """A CLIPTokenizer whose byte-pair merges were learned on captions; words it does not know fall into characters.

    The vocabulary is kept so small that some words of the world stay in two pieces, as long words do in the real one.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    import json

    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in learned["merges"]]
    split = {"background</w>", "triangle</w>"}
    merges = [m for m in merges if "".join(m) not in split]
    # The trainer numbers single characters in the order of a hash table, another one in every process.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocabulary = {p: i for i, p in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)  # type: ignore[arg-type]


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


def build_unet() -> Any:
    """UNet2DConditionModel: cross-attention at 16x16, 8x8 and in the middle, four heads."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE, block_out_channels=(64, 96, 128), layers_per_block=1, attention_head_dim=4,
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
        num_attention_heads=4, max_position_embeddings=POSITIONS, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _corpus() -> Iterable[str]:
    yield from string.ascii_lowercase + string.digits + string.punctuation
    for seed in range(2000):
        yield sample_scene(seed).caption
