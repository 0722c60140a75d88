"""Previews: a VAE that overflows in float16, latents normalised by the config, pictures that are not finite."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from sdattn_fast.guidance.clip_score import ClipScorer
from sdattn_fast.guidance.pictures import decode_latents, encode_pictures, pil_pictures, uint8_pictures

SCALE, MEAN, STD = 0.13025, [0.1, -0.4, 2.0, 0.7], [3.0, 1.5, 0.5, 2.0]


def _vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=32, scaling_factor=SCALE, **config,
    ).eval().requires_grad_(False)  # fmt: skip


def _overflows(vae: Any) -> Any:
    """As SDXL's: activations of its decoder, and here its encoder, are beyond 65504, and normalised afterwards."""
    vae.decoder.conv_in.weight *= 3e4
    vae.encoder.conv_in.weight *= 2e5
    return vae


@pytest.mark.parametrize("normalised", [False, True], ids=["scaled", "mean and std"])
def test_decoding_is_what_the_sdxl_pipeline_does(normalised: bool) -> None:
    vae = _overflows(_vae(**({"latents_mean": MEAN, "latents_std": STD} if normalised else {}))).half()
    latents = torch.randn(2, 4, 16, 16).half()
    assert not bool(torch.isfinite(vae.decode(latents / SCALE).sample).all()), "the case is one"

    exact = copy.deepcopy(vae).double()
    x = latents.double() / SCALE
    if normalised:
        mean, std = (torch.tensor(numbers, dtype=torch.float64).view(1, 4, 1, 1) for numbers in (MEAN, STD))
        x = latents.double() * std / SCALE + mean
    want = exact.decode(x).sample

    before = {name: p.clone() for name, p in vae.state_dict().items()}
    got = decode_latents(vae, latents)
    torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-3)
    assert all(p.dtype == torch.float16 and torch.equal(p, before[name]) for name, p in vae.state_dict().items())


@pytest.mark.parametrize("normalised", [False, True], ids=["scaled", "mean and std"])
def test_encoding_is_the_other_way_round(normalised: bool) -> None:
    vae = _overflows(_vae(**({"latents_mean": MEAN, "latents_std": STD} if normalised else {}))).half()
    pictures = torch.rand(2, 3, 32, 32).half() * 2 - 1
    assert not bool(torch.isfinite(vae.encode(pictures).latent_dist.mode()).all()), "the case is one"
    want = copy.deepcopy(vae).double().encode(pictures.double()).latent_dist.mode()
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(1, 4, 1, 1) for numbers in (MEAN, STD))
    want = (want - mean) * SCALE / std if normalised else want * SCALE
    torch.testing.assert_close(encode_pictures(vae, pictures), want.float(), rtol=1e-3, atol=1e-3)
    assert vae.dtype == torch.float16


def test_the_vae_is_float16_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = _vae().half()

    def fails(*_: Any, **__: Any) -> None:
        assert vae.dtype == torch.float32
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vae, "decode", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        decode_latents(vae, torch.randn(1, 4, 16, 16))
    assert vae.dtype == torch.float16


@pytest.mark.parametrize(("dtype", "config"), [(torch.float16, {"force_upcast": False}), (torch.bfloat16, {})])
def test_a_vae_that_need_not_be_upcast_is_left_in_its_dtype(
    dtype: torch.dtype, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = _vae(**config).to(dtype)
    decode, seen = vae.decode, []
    monkeypatch.setattr(vae, "decode", lambda z, **keywords: seen.append(z.dtype) or decode(z, **keywords))
    decode_latents(vae, torch.randn(1, 4, 16, 16))
    assert seen == [dtype]


def test_gradients_do_not_pass_a_vae_that_would_be_upcast() -> None:
    with pytest.raises(ValueError, match=r"vae: gradients cannot pass.*vae\.to\(torch\.float32\)"):
        decode_latents(_vae().half(), torch.randn(1, 4, 16, 16, requires_grad=True))
    latents = torch.randn(1, 4, 16, 16, requires_grad=True)
    decode_latents(_vae(), latents).sum().backward()
    assert latents.grad is not None and bool(latents.grad.any())


def test_pictures_that_are_not_finite_are_named() -> None:
    latents = torch.randn(3, 4, 16, 16)
    latents[1, 0, 2, 3] = float("nan")
    named = "pictures: expected finite numbers, got NaN or infinity in picture 1 of 3"
    with pytest.raises(ValueError, match=named):
        decode_latents(_vae(), latents)
    images = np.random.default_rng(0).random((3, 8, 8, 3)).astype(np.float32)
    assert np.array_equal(np.asarray(pil_pictures(images)[2]), (images[2] * 255).round().astype("uint8"))
    images[1, 0, 0, 0] = np.nan
    for make in (uint8_pictures, pil_pictures):
        with pytest.raises(ValueError, match=named):
            make(images)


def test_clip_scores_no_picture_that_is_not_finite() -> None:
    from sdattn_fast.lab import shapes_path

    scorer = ClipScorer.load(shapes_path() / "clip")
    pictures = [np.full((64, 64, 3), 0.5, np.float32) for _ in range(3)]
    pictures[1][0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="pictures: expected finite numbers, got NaN or infinity in picture 1 of 3"):
        scorer.pictures(pictures)
    scorer.model.visual_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite embeddings from CLIP, got NaN or infinity for picture 0 of 1"):
        scorer.pictures([np.zeros((64, 64, 3), np.uint8)])
