"""What a gate by CLIP costs a picture: looks at SD 1.5's true geometry, random weights; and whole pictures of shapes.

A look decodes the predicted clean picture, by the VAE or linearly, and shows it to CLIP; the phrases' texts are read
once. Beside them stands a denoising step, two entries for guidance. By default a gate looks five times a picture,
after steps 2, 5, 8, 11 and 14. Times are of the process's CPU: with OMP_NUM_THREADS=1 a busy machine does not change
them much. One model is in memory at a time; one round of what is heavy. No test asserts a figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("textblob")

from sdattn_fast.guidance.clip_gate import ClipGate
from sdattn_fast.guidance.clip_score import ClipScorer
from sdattn_fast.guidance.pictures import decode_latents
from sdattn_fast.guidance.preview import LinearDecoder
from sdattn_fast.lab import load_pipeline, shapes_path

LOOKS, STEPS = 5, 50
PHRASES = ("a red circle", "a blue square")
TOWERS = {
    "ViT-B/32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 32},
    "ViT-L/14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14},
}
TEXTS = {
    "ViT-B/32": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
    "ViT-L/14": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}


def _medians(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of the process's CPU time; the ways take turns."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            start = time.process_time()
            call()
            times[way].append(1e3 * (time.process_time() - start))
    return {way: statistics.median(taken) for way, taken in times.items()}


def _scorer(name: str) -> ClipScorer:
    """A CLIP of that geometry, with the small tokenizer of shapes: the length of a text is 77 all the same."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(shapes_path() / "clip")
    vision = TOWERS[name] | {"num_attention_heads": TOWERS[name]["hidden_size"] // 64, "image_size": 224}
    text = TEXTS[name] | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["hidden_size"])
    return ClipScorer(CLIPModel(config), tokenizer, CLIPImageProcessor())


@torch.no_grad()
def test_a_look(benchmark):
    ms = {"a denoising step": _denoising_step()} | _decodes()
    for name in TOWERS:
        ms |= _clip(name)
    step = ms["a denoising step"]
    rows: dict[str, Any] = {way: {"ms": round(took, 1), "of_a_step": f"{took / step:.4f}"} for way, took in ms.items()}
    stock = STEPS * step + ms["VAE decode"]
    for name in TOWERS:
        for decode in ("VAE", "linear"):
            gate = LOOKS * (ms[f"{decode} decode"] + ms[f"{name} sees"]) + ms[f"{name} reads two phrases"]
            rows[f"a picture's gate, {decode}, {name}"] = {
                "ms": round(gate, 1), "of_a_step": f"{gate / step:.4f}", "of_a_picture": f"{gate / stock:.4f}",
            }  # fmt: skip
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(lambda: None, rounds=1)


def _denoising_step() -> float:
    from sdattn_fast.cli.registry import build_random_unet, random_inputs

    unet = build_random_unet("sd15")
    inputs = random_inputs(unet.config, 2, torch.float32)
    return _medians({"": lambda: unet(**inputs)}, 1)[""]


def _decodes() -> dict[str, float]:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
    ).eval()  # fmt: skip
    linear, latent = LinearDecoder(torch.randn(4, 3), torch.zeros(3)), torch.randn(1, 4, 64, 64)
    by_vae = _medians({"VAE decode": lambda: decode_latents(vae, latent)}, 1)
    enlarged = {"linear decode": lambda: F.interpolate(linear(latent), size=(512, 512), mode="bilinear")}
    return by_vae | _medians(enlarged, 9)


def _clip(name: str) -> dict[str, float]:
    scorer = _scorer(name)
    pixels = [np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)]

    def read() -> None:
        scorer._texts.clear()
        scorer.texts(PHRASES)

    return _medians({f"{name} sees": lambda: scorer.pictures(pixels), f"{name} reads two phrases": read}, 3)


def test_a_picture_of_shapes(benchmark):
    import sdattn_fast
    from sdattn_fast.lab.shapes.world import sample_scene

    pipe: Any = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    scorer = ClipScorer.load(shapes_path() / "clip")
    scenes = [sample_scene(i).image for i in range(16)]
    pictures = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1 for image in scenes])
    decoders = {"VAE": None, "linear": LinearDecoder.fit(pipe.vae, pictures)}
    prompt = " and ".join(PHRASES)

    def draw(callback: Any = None) -> None:
        make = torch.Generator().manual_seed(0)
        pipe(prompt, num_inference_steps=20, guidance_scale=4.0, generator=make, callback_on_step_end=callback)

    def gated(decoder: LinearDecoder | None) -> None:
        with ClipGate(patch, prompt, scorer, how="amplify", threshold=0.3, decoder=decoder) as gate:
            draw(gate)
        assert len(gate.scores) == LOOKS

    with sdattn_fast.apply(pipe) as patch:
        ways = {"no gate": draw, **{f"gate, {name}": lambda d=d: gated(d) for name, d in decoders.items()}}
        _medians(ways, 1)
        ms = _medians(ways, 3)
    benchmark.extra_info["rows"] = {
        way: {"ms": round(took, 1), "of_no_gate": f"{took / ms['no gate']:.3f}"} for way, took in ms.items()
    }
    benchmark.pedantic(lambda: None, rounds=1)
