"""Tiny transformers with cross-attention and their pipelines: diffusers' true classes, random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "chronoedit", "hunyuan", "hunyuan_controlnet", "inputs_of", "latte", "ltx", "ltx_pipeline", "pixart",
    "pixart_pipeline", "run_model", "sana", "sana_pipeline", "skyreels", "unet_3d", "unet_motion", "video_inputs_of",
    "wan", "wan_pipeline", "wan_vace",
]  # fmt: skip

TEXT, CAPTION = 16, 16  # the layers' width, and the text encoder's


def pixart(sample_size: int = 8) -> Any:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
        sample_size=sample_size, cross_attention_dim=TEXT, caption_channels=CAPTION, norm_num_groups=1,
        use_additional_conditions=False,
    )  # fmt: skip
    return _stirred(model)


def sana() -> Any:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=TEXT, caption_channels=CAPTION,
        sample_size=8, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return _stirred(model)


_HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8,
    "hidden_size": 16, "mlp_ratio": 2.0, "cross_attention_dim": CAPTION, "cross_attention_dim_t5": CAPTION,
    "text_len": 4, "text_len_t5": 6, "pooled_projection_dim": 4, "activation_fn": "gelu-approximate",
}  # fmt: skip


def hunyuan() -> Any:
    from diffusers import HunyuanDiT2DModel

    return _stirred(HunyuanDiT2DModel(num_layers=2, **_HUNYUAN))


def hunyuan_controlnet() -> Any:
    from diffusers import HunyuanDiT2DControlNetModel

    return _stirred(HunyuanDiT2DControlNetModel(transformer_num_layers=4, **_HUNYUAN))


_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": CAPTION, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip


def wan(image: bool = False) -> Any:
    """image: as the image-to-video models, whose layers attend to tokens of an image, too."""
    from diffusers import WanTransformer3DModel

    return _stirred(WanTransformer3DModel(**_WAN, **({"image_dim": 8, "added_kv_proj_dim": 24} if image else {})))


def wan_vace() -> Any:
    from diffusers import WanVACETransformer3DModel

    return _stirred(WanVACETransformer3DModel(**_WAN, vace_layers=[0], vace_in_channels=4))


def skyreels() -> Any:
    from diffusers import SkyReelsV2Transformer3DModel

    return _stirred(SkyReelsV2Transformer3DModel(**_WAN))


def chronoedit() -> Any:
    from diffusers import ChronoEditTransformer3DModel

    return _stirred(ChronoEditTransformer3DModel(**_WAN))


def ltx() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=CAPTION,
    )  # fmt: skip
    return _stirred(model)


def latte() -> Any:
    from diffusers import LatteTransformer3DModel

    return _stirred(
        LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            patch_size=2,
            sample_size=8,
            cross_attention_dim=TEXT,
            caption_channels=CAPTION,
            video_length=3,
        )
    )


def unet_3d() -> Any:
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=CAPTION,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return _stirred(model)


def unet_motion() -> Any:
    from diffusers import UNetMotionModel

    model = UNetMotionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=CAPTION,
        num_attention_heads=2, motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip
    return _stirred(model)


def video_inputs_of(
    model: Any,
    *,
    frames: int = 3,
    height: int = 8,
    width: int = 12,
    tokens: int = 512,
    lengths: tuple[int, ...] = (3, 7),
) -> dict[str, Any]:
    """As `inputs_of`, of texts whose end is rows of zeros."""
    batch, kind = len(lengths), type(model).__name__
    text = torch.randn(batch, tokens, CAPTION) * _mask(tokens, lengths)[..., None]
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, frames, height, width), "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": text, "return_dict": False,
    }  # fmt: skip
    if getattr(model.config, "image_dim", None):
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 9, model.config.image_dim)
    if kind == "LTXVideoTransformer3DModel":
        inputs["hidden_states"] = torch.randn(batch, frames * (height // 2) * (width // 2), 4)
        inputs["encoder_attention_mask"] = _mask(tokens, lengths)
        inputs |= {"num_frames": frames, "height": height // 2, "width": width // 2}
    if kind == "WanVACETransformer3DModel":
        inputs["control_hidden_states"] = torch.randn(batch, 4, frames, height, width)
    return inputs


def inputs_of(
    model: Any, *, height: int = 8, width: int = 12, tokens: int = 120, lengths: tuple[int, ...] = (3, 7)
) -> Any:
    """A forward's arguments, of a batch of texts of which only so many tokens each are not masked."""
    batch = len(lengths)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, height, width),
        "timestep": torch.full((batch,), 5.0),
        "return_dict": False,
    }
    if type(model).__name__ == "HunyuanDiT2DControlNetModel":
        inputs["controlnet_cond"] = torch.randn(batch, 4, height, width)
    if type(model).__name__.startswith("HunyuanDiT2D"):
        from diffusers.models.embeddings import get_2d_rotary_pos_embed

        half = height // 2, width // 2
        return inputs | {
            "encoder_hidden_states": torch.randn(batch, 4, CAPTION), "text_embedding_mask": _mask(4, lengths),
            "encoder_hidden_states_t5": torch.randn(batch, 6, CAPTION), "text_embedding_mask_t5": _mask(6, lengths),
            "image_meta_size": torch.ones(batch, 6), "style": torch.zeros(batch, dtype=torch.long),
            "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), half), half, output_type="pt"),
        }  # fmt: skip
    if type(model).__name__ == "PixArtTransformer2DModel":
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    text, mask = torch.randn(batch, tokens, CAPTION), _mask(tokens, lengths)
    return inputs | {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def wan_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _tokenizer(eos="</s>")
    config = UMT5Config(vocab_size=len(tokenizer), d_model=CAPTION, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    encoder = UMT5EncoderModel(config).eval()
    return _quiet(WanPipeline(tokenizer, encoder, None, FlowMatchEulerDiscreteScheduler(), wan()))


def ltx_pipeline() -> Any:
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline
    from transformers import T5Config, T5EncoderModel

    tokenizer = _tokenizer(eos="</s>")
    config = T5Config(vocab_size=len(tokenizer), d_model=CAPTION, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    return _quiet(LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae, T5EncoderModel(config).eval(), tokenizer, ltx()))


@torch.no_grad()
def run_model(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What it predicts."""
    out: Tensor = model(**inputs)[0]
    return out


def pixart_pipeline() -> Any:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline
    from transformers import T5Config, T5EncoderModel

    tokenizer = _tokenizer(eos="</s>")
    config = T5Config(vocab_size=len(tokenizer), d_model=CAPTION, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    return _quiet(PixArtAlphaPipeline(tokenizer, encoder, None, pixart(), DDIMScheduler()))


def sana_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = _tokenizer(bos="<bos>", eos="<eos>")
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=CAPTION, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, pad_token_id=0,
    )  # fmt: skip
    encoder = Gemma2Model(config).eval()
    return _quiet(SanaPipeline(tokenizer, encoder, None, sana(), FlowMatchEulerDiscreteScheduler()))


def _stirred(model: Any) -> Any:
    """Its zeros, with which modulations begin, made numbers."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval().requires_grad_(False)


def _mask(tokens: int, lengths: tuple[int, ...]) -> Tensor:
    return (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).float()


def _tokenizer(eos: str, bos: str | None = None) -> Any:
    """A word is a token; with an EOS at the end, or, as Gemma's, with a BOS before alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", eos, "<unk>", "a", "red", "car", "and", "blue", "fish", "ugly", *([] if bos is None else [bos])]
    inside = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inside.pre_tokenizer = Whitespace()
    around = f"$A {eos}" if bos is None else f"{bos} $A"
    special = eos if bos is None else bos
    inside.post_processor = TemplateProcessing(single=around, special_tokens=[(special, words.index(special))])
    return PreTrainedTokenizerFast(
        tokenizer_object=inside, bos_token=bos, eos_token=eos, unk_token="<unk>", pad_token="<pad>",
        model_max_length=512,
    )  # fmt: skip


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
