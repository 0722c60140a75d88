"""Tiny models of every architecture that the patch serves, built in code: random weights, real diffusers pipelines."""

from __future__ import annotations

import gc
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TEXT, PICTURE = 32, 32


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _what_is_imported_is_no_garbage() -> Iterator[None]:
    """Half a million objects of torch and diffusers, at which a garbage collection would look each time."""
    import diffusers

    assert diffusers.StableDiffusionPipeline and diffusers.StableDiffusionXLPipeline  # imported when asked for
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every letter is a token; BOS, EOS and padding as in CLIP."""
    return _tokenizer(tmp_path_factory.mktemp("tokenizer"), pad="<|endoftext|>")


@pytest.fixture(scope="session")
def tokenizer_2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As SDXL's second: padded with "!"."""
    return _tokenizer(tmp_path_factory.mktemp("tokenizer_2"), pad="!")


@pytest.fixture(scope="session")
def parts(tokenizer: Any, tokenizer_2: Any) -> dict[str, Any]:
    """The modules, shared by all tests, which leave them as they were."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    made: dict[str, Any] = {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": CLIPTextModel(_text_config(tokenizer)),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizer_2)),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=PICTURE,
        ),
        "sd15": _unet(attention_head_dim=2),
        "sd2": _unet(attention_head_dim=(2, 4), use_linear_projection=True),
        "inpaint": _unet(attention_head_dim=2, in_channels=9),
        "pix2pix": _unet(attention_head_dim=2, in_channels=8),
        "sdxl": _unet(**_SDXL),
    }  # fmt: skip
    made["controlnet"] = _controlnet(made["sd15"])
    made["sdxl_controlnet"] = _controlnet(made["sdxl"])
    made["small"] = _unet(**_SMALL)
    for module in made.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    return made


@pytest.fixture
def build(parts: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """build(architecture): a new pipeline on the shared modules.

    They get back their attention processors: diffusers' SAG leaves one there that hands its map on in an attribute, so
    that threads take each other's.
    """
    models = [one for one in parts.values() if hasattr(one, "attn_processors")]
    processors = [dict(one.attn_processors) for one in models]

    def build(name: str) -> Any:
        import diffusers as d

        sd = {k: parts[k] for k in ("vae", "text_encoder", "tokenizer")}
        sd |= {"safety_checker": None, "feature_extractor": None, "scheduler": _scheduler()}
        if name.startswith("sdxl"):
            sd = {k: parts[k] for k in ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
            sd["scheduler"] = _scheduler()
        makers: dict[str, Callable[[], Any]] = {
            "sd15": lambda: d.StableDiffusionPipeline(unet=parts["sd15"], requires_safety_checker=False, **sd),
            "small": lambda: d.StableDiffusionPipeline(unet=parts["small"], requires_safety_checker=False, **sd),
            "sd2": lambda: d.StableDiffusionPipeline(unet=parts["sd2"], requires_safety_checker=False, **sd),
            "sdxl": lambda: d.StableDiffusionXLPipeline(unet=parts["sdxl"], add_watermarker=False, **sd),
            "controlnet": lambda: d.StableDiffusionControlNetPipeline(
                unet=parts["sd15"], controlnet=parts["controlnet"], requires_safety_checker=False, **sd
            ),
            "sdxl_controlnet": lambda: d.StableDiffusionXLControlNetPipeline(
                unet=parts["sdxl"], controlnet=parts["sdxl_controlnet"], add_watermarker=False, **sd
            ),
            "inpaint": lambda: d.StableDiffusionInpaintPipeline(
                unet=parts["inpaint"], requires_safety_checker=False, **sd
            ),
            "img2img": lambda: d.StableDiffusionImg2ImgPipeline(
                unet=parts["sd15"], requires_safety_checker=False, **sd
            ),
            "pix2pix": lambda: d.StableDiffusionInstructPix2PixPipeline(
                unet=parts["pix2pix"], requires_safety_checker=False, **sd
            ),
            "panorama": lambda: d.StableDiffusionPanoramaPipeline(
                unet=parts["sd15"],
                requires_safety_checker=False,
                **sd | {"scheduler": d.DDIMScheduler(clip_sample=False)},
            ),
            "animatediff": lambda: _animatediff(parts),
        }
        pipe = makers[name]()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    yield build
    for model, before in zip(models, processors, strict=True):
        model.set_attn_processor(before)


@pytest.fixture
def draw() -> Callable[..., np.ndarray]:
    """draw(pipe, prompt=..., ...): pictures (B, h, w, 3) in [0, 1], always from the same noise."""

    def draw(pipe: Any, prompt: Any = "a red car", seed: int = 0, **keywords: Any) -> np.ndarray:
        asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np"}
        asked |= {**_picture_inputs(pipe), **keywords}
        if prompt is not None:
            asked["prompt"] = prompt
        # One generator for all pictures: a list would have to know how many there are.
        return pipe(**asked, generator=torch.Generator().manual_seed(seed)).images

    return draw


@pytest.fixture
def psnr() -> Callable[[np.ndarray, np.ndarray], float]:
    """Decibels, for pictures in [0, 1]; equal ones have infinitely many."""

    def psnr(a: np.ndarray, b: np.ndarray) -> float:
        assert a.shape == b.shape
        assert np.isfinite(a).all() and np.isfinite(b).all()
        error = float(np.mean((a.astype(np.float64) - b) ** 2))
        return float("inf") if error == 0 else -10 * float(np.log10(error))

    return psnr


@pytest.fixture
def ip_adapter(parts: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
    """ip_adapter(unet): a state dict as `load_ip_adapter` takes it, random; image embeddings have 16 numbers."""

    def weights(unet: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        adapter = {}
        key = 1
        for name, _ in unet.attn_processors.items():
            if name.endswith("attn2.processor"):
                attn = unet.get_submodule(name.removesuffix(".processor"))
                for which in ("to_k_ip", "to_v_ip"):
                    shape = (attn.inner_dim, attn.cross_attention_dim)
                    adapter[f"{key}.{which}.weight"] = torch.randn(shape, generator=generator) * 0.3
                key += 2
        width = unet.config.cross_attention_dim
        projection = {
            "proj.weight": torch.randn(4 * width, 16, generator=generator),
            "proj.bias": torch.zeros(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        }
        return {"image_proj": projection, "ip_adapter": adapter}

    return weights


# One layer in a down block and one in the middle, alike: as much of SD 1.5 as many steps or a compilation need.
_SMALL: dict[str, Any] = {
    "attention_head_dim": 2,
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
_SDXL: dict[str, Any] = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 2 * TEXT,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
}


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": PICTURE // 2, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": TEXT,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **changes,
    }  # fmt: skip
    unet = UNet2DConditionModel(**config)
    # Random layers hardly look at the text: sharpen their maps, so that a wrong one shows.
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                module.to_q.weight *= 3
                module.to_k.weight *= 3
                module.to_out[0].weight *= 4
    return unet


def _controlnet(unet: Any) -> Any:
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    with torch.no_grad():
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.3)
    return net


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def _text_config(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=TEXT, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _tokenizer(folder: Path, pad: str) -> Any:
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, "!"]
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77, pad_token=pad)


def _picture_inputs(pipe: Any) -> dict[str, Any]:
    kind = type(pipe).__name__
    gradient = np.linspace(0, 255, PICTURE * PICTURE * 3).reshape(PICTURE, PICTURE, 3).astype(np.uint8)
    picture = Image.fromarray(gradient)
    if "Inpaint" in kind:
        mask = Image.fromarray((np.arange(PICTURE)[:, None] * np.ones(PICTURE) > 16).astype(np.uint8) * 255)
        return {"image": picture, "mask_image": mask, "height": PICTURE, "width": PICTURE}
    if "Img2Img" in kind:
        return {"image": picture, "strength": 1.0}
    if "ControlNet" in kind or "Pix2Pix" in kind:
        return {"image": picture}
    return {}


def _animatediff(parts: dict[str, Any]) -> Any:
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=2
    )
    pipe = AnimateDiffPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}, unet=parts["sd15"],
        motion_adapter=adapter, scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    pipe.unet.eval()
    return pipe
