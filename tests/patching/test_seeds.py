"""Random dropout: what is drawn for a picture depends on its own seed, its layer and its timestep."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sdattn_fast
from sdattn_fast import Program, SalienceDropout
from sdattn_fast.patching.seeds import LayerSeeds

RANDOM = Program(dropout=SalienceDropout(0.3, mode="random"))
PROMPTS = ["a red car", "a dog and a cat", "two birds"]
EXACT = {"atol": 2e-5, "rtol": 0.0}


def noise(pictures: int) -> torch.Tensor:
    return torch.randn(pictures, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def drawn(
    pipe: Any, seed: Any, prompts: list[str], latents: torch.Tensor, told: bool = False, **how: Any
) -> np.ndarray:
    """told: the user says which entries are active, of a batch with each prompt twice."""
    count = len(prompts)
    active = torch.arange(3 * count) >= count if told else None
    with sdattn_fast.apply(pipe, RANDOM, seed=seed, active=active):
        return pipe(prompts, latents=latents, num_inference_steps=2, output_type="np", **how).images


def with_pag(pipe: Any) -> Any:
    import diffusers

    return diffusers.StableDiffusionPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid"])


@pytest.mark.parametrize("seed, alone", [(7, (7, 8, 9)), ((7, 1, 4), (7, 1, 4)), (2**63 - 1, (2**63 - 1, 0, 1))])
@pytest.mark.parametrize(
    "architecture, how",
    [
        ("sd15", {"guidance_scale": 5.0}),
        ("sd15", {"guidance_scale": 1.0}),
        ("sdxl", {"guidance_scale": 5.0}),
        ("pag", {"guidance_scale": 5.0, "pag_scale": 3.0}),
        ("pag, told", {"guidance_scale": 5.0, "pag_scale": 3.0}),
        ("controlnet", {"guidance_scale": 5.0, "guess_mode": True}),
    ],
)
def test_a_picture_in_a_batch_is_the_picture_alone(
    architecture: str, how: dict[str, Any], seed: Any, alone: tuple[int, ...], build: Callable[[str], Any]
) -> None:
    perturbed = architecture.startswith("pag")
    pipe, latents = build("sd15" if perturbed else architecture), noise(3)
    pipe = with_pag(pipe) if perturbed else pipe
    told = architecture == "pag, told"
    image = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    how = how | ({"image": image} if architecture == "controlnet" else {})
    many = {"image": image.expand(3, -1, -1, -1)} if architecture == "controlnet" else {}
    together = drawn(pipe, seed, PROMPTS, latents, told, **how | many)
    for i in range(3):
        one = drawn(pipe, alone[i], PROMPTS[i : i + 1], latents[i : i + 1], told, **how)
        np.testing.assert_allclose(together[i : i + 1], one, **EXACT)
        other = drawn(pipe, alone[i] ^ 64, PROMPTS[i : i + 1], latents[i : i + 1], told, **how)
        assert np.abs(other - one).max() > 1e-3


def test_pictures_of_one_prompt_have_seeds_of_their_own(build: Callable[[str], Any]) -> None:
    pipe, latents = build("sd15"), noise(1).expand(2, -1, -1, -1)
    pictures = drawn(pipe, 7, PROMPTS[:1], latents, num_images_per_prompt=2)
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3
    for i in range(2):
        np.testing.assert_allclose(pictures[i : i + 1], drawn(pipe, 7 + i, PROMPTS[:1], latents[:1]), **EXACT)


def test_a_model_alone_and_a_processor_by_hand(parts: dict[str, Any]) -> None:
    unet, latents = parts["sd15"], noise(3)
    text = torch.randn(3, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    both, active = torch.cat([torch.zeros_like(text), text]), torch.tensor([False] * 3 + [True] * 3)

    def predicted(seed: Any, which: slice, active: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad(), sdattn_fast.apply(unet, RANDOM, seed=seed, active=active):
            if active is None:
                return unet(latents[which], 500, text[which]).sample
            return unet(torch.cat([latents, latents]), 500, both).sample[3:]

    together = predicted(7, slice(0, 3))
    torch.testing.assert_close(predicted(7, slice(0, 3), active), together, **EXACT)
    for i in range(3):
        torch.testing.assert_close(predicted(7 + i, slice(i, i + 1)), together[i : i + 1], **EXACT)

    stock = dict(unet.attn_processors)
    try:
        results = []
        for processor in (
            sdattn_fast.SemanticAttnProcessor(RANDOM, seed=7, active=active),
            sdattn_fast.SemanticAttnProcessor(RANDOM, seed=(7, 8, 9)),
        ):
            unet.set_attn_processor({k: processor if ".attn2." in k else v for k, v in stock.items()})
            with torch.no_grad():
                if processor.text.given.active is None:
                    results.append(unet(latents, 500, text).sample)
                else:
                    results.append(unet(torch.cat([latents, latents]), 500, both).sample[3:])
    finally:
        unet.set_attn_processor(stock)
    torch.testing.assert_close(*results, **EXACT)


def test_the_seed_makes_random_dropout_repeat(build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, RANDOM, seed=7) as patch:
        first, second = draw(pipe), draw(pipe)
        seeds = torch.stack([layer.seed for layer in patch._layers])
        assert len(seeds.unique()) == seeds.numel()
        assert (seeds >= 0).all()
    with sdattn_fast.apply(pipe, RANDOM, seed=8):
        other = draw(pipe)
    with sdattn_fast.apply(pipe, RANDOM):
        torch.manual_seed(1)
        drawn = draw(pipe)
        torch.manual_seed(1)
        again = draw(pipe)
    assert np.array_equal(first, second)
    assert np.array_equal(drawn, again)
    assert psnr(first, other) < 60


def test_a_mixed_seed_is_splitmix64() -> None:
    names = ["mid_block.attn2", "", "a"]
    keys = [zlib.crc32(name.encode()) for name in names]
    assert keys[1] == 0 and max(keys) >= 2**31, "with a key's top bit, which int64 must not take for a sign"
    of_entries = (2**63 - 1, 0, 7)
    seeds = LayerSeeds(names).at(of_entries, torch.tensor(981), torch.device("cpu"))

    def mixed(key: int, seed: int) -> int:
        word = 2**64 - 1
        x = ((key << 32) ^ int(np.float32(981).view(np.int32)) ^ seed) & word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return (x ^ (x >> 31)) & (2**63 - 1)

    assert seeds.tolist() == [[mixed(key, seed) for seed in of_entries] for key in keys]
    assert LayerSeeds(names).at(of_entries, 981, torch.device("cpu")).equal(seeds)


def test_videos_have_a_seed_each(build: Callable[[str], Any]) -> None:
    """AnimateDiff's frames are entries, of one picture's seed."""
    pipe = build("animatediff")
    latents = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def videos(seed: Any, which: slice) -> np.ndarray:
        with sdattn_fast.apply(pipe, RANDOM, seed=seed):
            return pipe(
                PROMPTS[:2][which], latents=latents[which], num_frames=3, num_inference_steps=1, output_type="np"
            ).frames

    for seed, alone in ((7, (7, 8)), ([7, 3], (7, [3]))):
        together = videos(seed, slice(0, 2))
        for i in range(2):
            np.testing.assert_allclose(together[i : i + 1], videos(alone[i], slice(i, i + 1)), **EXACT)


@pytest.mark.parametrize("seed", [7, [7]])
def test_windows_of_a_picture_have_its_seed(seed: Any, build: Callable[[str], Any]) -> None:
    pipe = build("panorama")

    def panorama(views: int) -> torch.Tensor:
        with sdattn_fast.apply(pipe, RANDOM, seed=seed):
            latents = pipe(
                "a red car", num_inference_steps=1, height=512, width=576, view_batch_size=views, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
        return latents[..., :64, :72]  # what this VAE's size leaves out is never drawn

    torch.testing.assert_close(panorama(1), panorama(2), rtol=1e-4, atol=1e-4)


def test_a_model_that_makes_several_entries_of_one() -> None:
    """Stable Video Diffusion's, whose text comes once for a video."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        num_attention_heads=2, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    ).eval()  # fmt: skip
    x, text = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 4, 16)

    def predicted(seed: Any, which: slice) -> torch.Tensor:
        with torch.no_grad(), sdattn_fast.apply(model, RANDOM, seed=seed):
            return model(x[which], 5.0, text[which], added_time_ids=torch.ones(len(x[which]), 3)).sample

    together = predicted(7, slice(0, 2))
    for i in range(2):
        torch.testing.assert_close(predicted(7 + i, slice(i, i + 1)), together[i : i + 1], rtol=1e-4, atol=1e-4)
    assert (predicted(9, slice(0, 1)) - together[:1]).abs().max() > 1e-3


def test_a_loop_over_prompts_that_were_encoded_together(build: Callable[[str], Any]) -> None:
    pipe, latents = build("sd15"), noise(3)
    with torch.no_grad(), sdattn_fast.apply(pipe, RANDOM, seed=7) as patch:
        text = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        together = pipe.unet(latents, 500, text).sample
        for seed in (7, [7, 8, 9]):
            patch.update(seed=seed)
            for i in range(3):
                alone = pipe.unet(latents[i : i + 1], 500, text[i : i + 1]).sample
                torch.testing.assert_close(alone, together[i : i + 1], **EXACT)
        patch.update(seed=[9])
        torch.testing.assert_close(pipe.unet(latents[2:], 500, text[2:]).sample, together[2:], **EXACT)


def test_two_forwards_before_a_checkpointed_backward(parts: dict[str, Any]) -> None:
    unet = copy.deepcopy(parts["sd15"]).train().requires_grad_(False)
    weight = unet.conv_in.weight.requires_grad_(True)
    x, texts = noise(3), [torch.randn(count, 77, 32) for count in (3, 2)]

    def gradient(checkpointed: bool) -> torch.Tensor:
        (unet.enable_gradient_checkpointing if checkpointed else unet.disable_gradient_checkpointing)()
        with sdattn_fast.apply(unet, RANDOM, seed=7):
            losses = [
                unet(x[: len(text)], t, text).sample.square().mean() for t, text in zip((500, 100), texts, strict=True)
            ]
            return torch.autograd.grad(sum(losses), weight)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-6)


def test_seeds_of_many_requests_are_not_kept(build: Callable[[str], Any]) -> None:
    with sdattn_fast.apply(build("sd15"), RANDOM) as patch:
        for seed in range(40):
            patch.update(seed=seed)
            patch.pipe("a red car", num_inference_steps=1, output_type="latent")
        assert len(patch._models[0].seeds._sent) <= 16


def test_seeds_are_as_many_as_pictures(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    for prompts in (PROMPTS, PROMPTS[0]):
        count = 1 if isinstance(prompts, str) else 3
        with (
            sdattn_fast.apply(pipe, RANDOM, seed=(1, 2)),
            pytest.raises(ValueError, match=rf"^seed: expected an int or {count} seeds, one for each picture, got 2$"),
        ):
            draw(pipe, prompts)


def test_an_active_of_another_batch_is_what_is_wrong(parts: dict[str, Any]) -> None:
    unet, text = parts["sd15"], torch.zeros(2, 77, parts["sd15"].config.cross_attention_dim)
    with (
        sdattn_fast.apply(unet, RANDOM, seed=7, active=torch.tensor([False, True, True])),
        pytest.raises(ValueError, match=r"^active: expected shape \(2,\)"),
    ):
        unet(noise(2), 500, text)


@pytest.mark.parametrize(
    "seed, error, message",
    [
        (1.5, TypeError, "seed: expected an int or None, got float"),
        ("7", TypeError, "seed: expected an int or None, got str"),
        ([1, None], TypeError, "seed: expected a sequence of ints, got None in it"),
        ([1, -1], ValueError, r"seed: expected 0 <= seed < 2\*\*63, got -1"),
        ([True], TypeError, "seed: expected an int or None, got bool"),
        (torch.tensor([1, 2]), TypeError, "seed: expected an int, a sequence of ints or None, got a Tensor"),
    ],
)
def test_what_is_no_seed(seed: Any, error: type[Exception], message: str, parts: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        sdattn_fast.apply(parts["sd15"], RANDOM, seed=seed)


def test_updated_seeds_are_those_of_a_new_patch(build: Callable[[str], Any]) -> None:
    pipe, latents, how = build("sd15"), noise(3), {"num_inference_steps": 2, "output_type": "np"}
    stock = pipe(PROMPTS, latents=latents, **how).images
    with sdattn_fast.apply(pipe, RANDOM, seed=7) as patch:
        first = pipe(PROMPTS, latents=latents, **how).images
        for seed in (3, [9, 8, 2**62]):
            patch.update(seed=seed)
            other = pipe(PROMPTS, latents=latents, **how).images
            assert np.abs(other - first).max() > 1e-3
            assert np.abs(other - stock).max() > 1e-3
            patch.update(seed=None)
            unseeded = pipe(PROMPTS, latents=latents, **how).images
            assert np.abs(unseeded - other).max() > 1e-3
            assert np.abs(unseeded - pipe(PROMPTS, latents=latents, **how).images).max() > 1e-3
            patch.update(seed=seed)
            np.testing.assert_array_equal(pipe(PROMPTS, latents=latents, **how).images, other)
        with pytest.raises(ValueError, match=r"seed: expected 0 <= seed"):
            patch.update(seed=-1)
        last = pipe(PROMPTS, latents=latents, **how).images
    np.testing.assert_array_equal(last, drawn(pipe, [9, 8, 2**62], PROMPTS, latents))


def test_seeds_are_not_read_where_nothing_is_random(build: Callable[[str], Any]) -> None:
    with sdattn_fast.apply(build("sd15"), Program(dropout=SalienceDropout(0.3)), seed=[1, 2]) as patch:
        patch.pipe(PROMPTS, num_inference_steps=1, output_type="latent")
