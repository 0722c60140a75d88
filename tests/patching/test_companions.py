"""Beside what else changes how a pipeline calls its UNet: FreeU, blocks that are skipped, windows, videos, schedulers.
What is right is told by stock pipelines and by a processor that keeps every map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from every_map import StoreEveryMap

import sdattn_fast
from sdattn_fast import Capture, Program, SalienceDropout

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
DROPS = Program(dropout=SalienceDropout(0.3))


@contextmanager
def skipping(unet: Any, run_in: tuple[int, ...]) -> Iterator[None]:
    """As DeepCache does it: the middle block runs in these steps alone, and what it gave last stands in the others."""
    block, step, kept = unet.mid_block, [-1], []
    forward = block.forward

    def instead(*args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        if step[0] in run_in:
            kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    block.forward = instead
    try:
        yield
    finally:
        del block.forward


@contextmanager
def freeu(pipe: Any) -> Iterator[None]:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    try:
        yield
    finally:
        pipe.disable_freeu()


@contextmanager
def lcm(pipe: Any) -> Iterator[None]:
    import diffusers

    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    yield


@contextmanager
def nothing(pipe: Any) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    "companion, how",
    [
        (freeu, {}),
        (lcm, {"guidance_scale": 1.0, "num_inference_steps": 4}),
        (nothing, {"guidance_rescale": 0.7}),
        (nothing, {"prompt": ["a red car", "two cats"], "num_images_per_prompt": 2}),
        (lambda pipe: skipping(pipe.unet, (0, 3, 4, 7)), {"num_inference_steps": 4}),
    ],
)
def test_an_empty_program_is_stock(
    companion: Any, how: dict[str, Any], build: Callable[[str], Any], draw: Any, psnr: Any
) -> None:
    pipe = build("sd15")
    before = draw(pipe, **how)
    with companion(pipe):
        stock = draw(pipe, **how)
        with sdattn_fast.apply(pipe, capture=Capture(layers="*")) as patch:
            assert psnr(draw(pipe, **how), stock) > 90
            assert len(patch.maps[MIDDLE]) == len(stock)
        if companion is not nothing:
            assert psnr(stock, before) < 60, "else nothing was tried"


@pytest.mark.parametrize("steps", [None, "latest"])
def test_a_block_that_is_skipped_has_no_maps_of_that_step(
    steps: str | None, build: Callable[[str], Any], draw: Any
) -> None:
    pipe = build("sd15")
    processors, kept = dict(pipe.unet.attn_processors), []
    pipe.unet.get_submodule(MIDDLE).set_processor(StoreEveryMap(kept))
    with skipping(pipe.unet, (0, 2)):
        draw(pipe, num_inference_steps=4)
    pipe.unet.set_attn_processor(processors)
    assert len(kept) == 2
    seen: list[torch.Tensor | None] = []

    def look(pipe: Any, step: int, timestep: Any, inputs: Any) -> Any:
        seen.append(patch.maps.get(MIDDLE))
        return inputs

    with (
        sdattn_fast.apply(pipe, capture=Capture(layers="*", steps=steps)) as patch,
        skipping(pipe.unet, (0, 2)),
    ):
        draw(pipe, num_inference_steps=4, callback_on_step_end=look)
    first, second = (p[-1:].mean(1).transpose(-1, -2).unflatten(-1, (8, 8)) for p in kept)
    mean = (first + second) / 2
    wanted = [first, first, mean, mean] if steps is None else [first, None, second, None]
    for ours, theirs in zip(seen, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", [1, 2])
def test_a_panorama_has_no_maps_and_no_previews(views: int, build: Callable[[str], Any], psnr: Any) -> None:
    from sdattn_fast.guidance import Preview

    pipe = build("panorama")

    def drawn(**more: Any) -> torch.Tensor:
        latents = pipe(
            "a red car", num_inference_steps=1, height=512, width=576, view_batch_size=views, output_type="latent",
            generator=torch.Generator().manual_seed(0), **more,
        ).images  # fmt: skip
        # The window counts pixels of a VAE that halves three times: the rest of these latents is never drawn.
        return latents[..., :64, :72]

    stock = drawn()
    with sdattn_fast.apply(pipe):
        torch.testing.assert_close(drawn(), stock, rtol=1e-4, atol=1e-4)
    with sdattn_fast.apply(pipe, DROPS):
        assert (drawn() - stock).abs().max() > 1e-3
    with (
        sdattn_fast.apply(pipe, capture=Capture()),
        pytest.raises(ValueError, match=r"^capture: .*StableDiffusionPanoramaPipeline draws them in windows"),
    ):
        drawn()

    def look(pipe: Any, step: int, timestep: Any, inputs: Any) -> Any:
        preview.latent(pipe)
        return inputs

    with sdattn_fast.apply(pipe) as patch:
        preview = Preview(patch)
        with pytest.raises(ValueError, match=r"^pipe: .*StableDiffusionPanoramaPipeline has windows"):
            drawn(callback_on_step_end=look)


def test_videos_whose_prompt_changes(build: Callable[[str], Any]) -> None:
    """AnimateDiff's text between two prompts is neither's: what is content is asked for, and taken."""
    pipe, frames = build("animatediff"), 8

    def drawn(prompt: Any) -> np.ndarray:
        return pipe(
            prompt, num_frames=frames, num_inference_steps=1, height=32, width=32, guidance_scale=5.0,
            output_type="np", generator=torch.Generator().manual_seed(0),
        ).frames[0]  # fmt: skip

    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        drawn("a red car")
        assert {len(maps) for maps in patch.maps.values()} == {frames}
    pipe.enable_free_noise(context_length=4, context_stride=2)
    travel = {0: "a red car", 4: "two cats", 7: "a dog"}
    stock = drawn(dict(travel))
    with sdattn_fast.apply(pipe):
        np.testing.assert_allclose(drawn(dict(travel)), stock, atol=1e-4)
    with (
        sdattn_fast.apply(pipe, DROPS),
        pytest.raises(ValueError, match=r"Pass active=, bool \(16,\), True for prompts, and protected=, bool \(77,\)"),
    ):
        drawn(dict(travel))
    told = {"active": torch.arange(2 * frames) >= frames, "protected": torch.arange(77) > 5}
    with sdattn_fast.apply(pipe, DROPS, **told):
        assert np.abs(drawn(dict(travel)) - stock).max() > 1e-3


def test_t2i_adapters(build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    import diffusers

    sd = build("sd15").components
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.2)
    pipe = diffusers.StableDiffusionAdapterPipeline(
        **{name: part for name, part in sd.items() if name != "image_encoder"}, adapter=adapter.eval(),
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    how = {"image": torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32), "height": 32, "width": 32}
    stock = draw(pipe, **how)
    assert psnr(stock, draw(pipe, **how | {"image": 1 - how["image"]})) < 60
    with sdattn_fast.apply(pipe, capture=Capture(layers="*")) as patch:
        assert psnr(draw(pipe, **how), stock) > 90
        assert {len(maps) for maps in patch.maps.values()} == {1}


def test_a_processor_set_over_the_patch_leaves_a_recipe_without_maps(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    with (
        sdattn_fast.apply(pipe, recipe="objects"),
        pytest.warns(UserWarning, match="layers run another processor, set over the patch's"),
        pytest.raises(ValueError, match="got none: no captured layer ran with the patch's processor"),
    ):
        pipe.enable_attention_slicing()
        draw(pipe, "a red car and a dog", num_inference_steps=3)
