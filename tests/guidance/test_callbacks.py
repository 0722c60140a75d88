# ruff: noqa: F811
"""What callbacks see of a step: in every pipeline that guides in its own way, beside other callbacks, in parts of a
schedule. What is right is what the pipeline gave its scheduler."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from tiny_models import _one_thread, build, draw, parts, psnr, tokenizer, tokenizer_2  # noqa: F401

import sdattn_fast
from sdattn_fast import Capture
from sdattn_fast.guidance import Correction, Presence, Preview, Structure
from sdattn_fast.guidance.correction import _reads_latents
from sdattn_fast.guidance.guided import guided_prediction

CAPTION = "a red car"


def pag(sd: Any) -> Any:
    import diffusers

    made = diffusers.StableDiffusionPAGPipeline(
        **sd.components, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    "name, how",
    [
        ("sd15", {}),
        ("sd15", {"guidance_scale": 1.0}),
        ("sd15", {"guidance_rescale": 0.7}),
        ("sd15", {"prompt": ["a red car", ""], "negative_prompt": ["a red car", "ugly"]}),
        ("sd15", {"prompt": ["a red car", "cat"], "num_images_per_prompt": 2}),
        ("sdxl", {}),
        ("inpaint", {}),
        ("img2img", {"strength": 0.6, "num_inference_steps": 5}),
        ("controlnet", {"guess_mode": True}),
        ("pix2pix", {}),
        ("pag", {"pag_scale": 2.0}),
        ("pag", {"pag_scale": 2.0, "guidance_scale": 1.0}),
        ("pag", {"pag_scale": 2.0, "pag_adaptive_scale": 0.001, "prompt": ["a red car", "cat"]}),
    ],
)
def test_the_guided_prediction_is_the_pipelines(
    name: str, how: dict[str, Any], build: Callable[[str], Any], draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pag(build("sd15")) if name == "pag" else build(name)
    stepped: list[torch.Tensor] = []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda x, *a, **k: stepped.append(x) or step(x, *a, **k))
    found = []
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        preview = Preview(patch)

        def look(pipe: Any, i: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            found.append(guided_prediction(pipe, patch.current_call.forwards))
            latents = preview.latent(pipe)
            assert latents.shape == inputs["latents"].shape
            return inputs

        draw(pipe, **{"prompt": CAPTION, "num_inference_steps": 3, "callback_on_step_end": look, **how})
        preview.remove()
        assert patch._wants_forwards == 0
    assert len(found) == len(stepped) > 1
    torch.testing.assert_close(torch.stack(found), torch.stack(stepped), atol=2e-4, rtol=1e-3)


def test_guidance_that_was_cut_off(build: Callable[[str], Any], draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sd15")
    stepped: list[torch.Tensor] = []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda x, *a, **k: stepped.append(x) or step(x, *a, **k))
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        for first in (True, False):
            found: list[torch.Tensor] = []

            class Look:
                tensor_inputs = ("latents",)
                preview = Preview(patch)

                def __call__(self, pipe: Any, i: int, t: Any, inputs: dict[str, Any], found: Any = found) -> Any:
                    found.append(guided_prediction(pipe, patch.current_call.forwards))
                    return inputs

            cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
            order = [Look(), cut] if first else [cut, Look()]
            stepped.clear()
            draw(pipe, num_inference_steps=4, callback_on_step_end=MultiPipelineCallbacks(order))
            torch.testing.assert_close(torch.stack(found), torch.stack(stepped), atol=1e-5, rtol=1e-4)


def test_two_forwards_of_unknown_purpose_are_an_error(build: Callable[[str], Any], draw: Any) -> None:
    import diffusers

    sd = build("sd15")
    components = {k: v for k, v in sd.components.items() if k != "image_encoder"}
    pipe = diffusers.StableDiffusionSAGPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        preview = Preview(patch)
        with pytest.raises(ValueError, match="pipe: StableDiffusionSAGPipeline asked its UNet 2 times in a step"):
            draw(pipe, height=32, width=32, callback=lambda *_: preview.latent(pipe), callback_steps=1)


def test_chained_callbacks_each_see_the_step(build: Callable[[str], Any], draw: Any) -> None:
    """In any order: what each alone would see, whatever the others ask the UNet in between."""
    pipe = build("sd15")
    x0: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **{**kwargs, "return_dict": True})
        x0.append(out.pred_original_sample)
        return (out.prev_sample,)

    for order in itertools.permutations(range(3)):
        seen: list[torch.Tensor] = []
        x0.clear()
        pipe.scheduler.step = stepped
        with sdattn_fast.apply(pipe, capture=Capture(layers="*")) as patch:
            score = Presence([(1,), (5,)])
            correct = Correction(patch, score, steps=(0, 3), strength=0.0)
            refine = Structure(patch, CAPTION, steps=(0, 1), strength=0.0)

            class Look:
                tensor_inputs = ("latents",)

                def __init__(self, seen: list[torch.Tensor], preview: Preview) -> None:
                    self.seen, self.preview = seen, preview

                def __call__(self, pipe: Any, i: int, t: Any, inputs: Any) -> Any:
                    self.seen.append(self.preview.latent(pipe))
                    return inputs

            chained = [(correct, refine, Look(seen, Preview(patch)))[i] for i in order]
            draw(pipe, num_inference_steps=3, callback_on_step_end=MultiPipelineCallbacks(chained))
            correct.remove()
            refine.remove()
        del pipe.scheduler.step
        torch.testing.assert_close(torch.stack(seen), torch.stack(x0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "HeunDiscreteScheduler"]
)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_corrections_are_at_the_timestep_that_follows(
    scheduler: str, strength: float, build: Callable[[str], Any], draw: Any
) -> None:
    """Of an image-to-image run, which begins inside the schedule; none after its last step, nor where the next one does
    not read the latents (test_recipe.py)."""
    import diffusers

    pipe = build("img2img")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    steps: list[float] = []
    read: list[bool] = []
    at: list[float] = []

    def score(seen: Any) -> torch.Tensor:
        at.append(float(seen.t))
        return seen.prediction.square().mean()

    with sdattn_fast.apply(pipe) as patch, Correction(patch, score, strength=0.0) as correct:

        def call(pipe: Any, i: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            steps.append(float(t))
            read.append(_reads_latents(pipe.scheduler))
            return correct(pipe, i, t, inputs)

        draw(pipe, num_inference_steps=6, strength=strength, callback_on_step_end=call)
    assert len(steps) > 2 and at == [t for t, before in zip(steps[1:], read[:-1], strict=True) if before]
    assert len(at) > 1


def test_previews_in_threads(build: Callable[[str], Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pipe = build("sd15")

    def request(i: int, patch: Any, preview: Preview) -> torch.Tensor:
        mine = copy.copy(pipe)
        mine.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        mine.tokenizer = copy.deepcopy(pipe.tokenizer)  # transformers' are not safe for threads
        seen: list[torch.Tensor] = []
        mine(
            "abcdef"[i], num_inference_steps=3, output_type="latent", guidance_scale=4.0,
            latents=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i)),
            callback_on_step_end=lambda p, step, t, inputs: seen.append(preview.latent(p)) or inputs,
        )  # fmt: skip
        return torch.stack(seen)

    with sdattn_fast.apply(pipe) as patch:
        preview = Preview(patch)
        right = [request(i, patch, preview) for i in range(6)]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(request, range(6), [patch] * 6, [preview] * 6))
    torch.testing.assert_close(torch.stack(found), torch.stack(right), atol=1e-5, rtol=1e-4)


def test_a_preview_of_embeddings_that_are_not_known(build: Callable[[str], Any], draw: Any) -> None:
    """Is refused, or right where `active` says which entries are prompts."""
    pipe = build("sd15")
    embeds = {"prompt_embeds": torch.randn(1, 77, 32), "negative_prompt_embeds": torch.randn(1, 77, 32)}
    seen = []
    for active in (None, torch.tensor([False, True])):
        with sdattn_fast.apply(pipe, active=active) as patch:
            preview = Preview(patch)

            def look(pipe: Any, i: int, t: Any, inputs: dict[str, Any], preview: Any = preview) -> dict[str, Any]:
                seen.append(preview.latent(pipe))
                return inputs

            draw(pipe, None, callback_on_step_end=look, **embeds)
    # Embeddings handed to the patched pipeline are told by their position; their tokens are of no matter here.
    np.testing.assert_allclose(seen[0], seen[2], atol=1e-6)
    assert all(x.shape == (1, 4, 16, 16) for x in seen)


def test_a_gate_of_each_thread(build: Callable[[str], Any]) -> None:
    """What a callback sets for its picture (`ClipGate`) is that picture's alone, and ends with it."""
    from concurrent.futures import ThreadPoolExecutor

    pipe = build("sd15")
    gates = [torch.linspace(0, 2 + i, 77) for i in range(6)]

    def request(i: int, patch: Any) -> np.ndarray:
        mine = copy.copy(pipe)
        mine.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        mine.tokenizer = copy.deepcopy(pipe.tokenizer)  # transformers' are not safe for threads

        def gate(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            patch.current_call.gate = gates[i] if step % 2 == 0 else None
            return inputs

        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i))
        found = mine(
            "abcdef"[i], num_inference_steps=4, output_type="np", latents=noise, callback_on_step_end=gate
        ).images
        assert patch.current_call.gate is None
        return found

    with sdattn_fast.apply(pipe) as patch:
        right = [request(i, patch) for i in range(6)]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(request, range(6), [patch] * 6))
    np.testing.assert_allclose(np.stack(found), np.stack(right), atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_reweighting_where_guidance_is_cut_off(first: bool, build: Callable[[str], Any], draw: Any) -> None:
    """The bias is the pictures': the next step's batch has no unconditional entries, and their rows have the rest."""
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, capture=Capture(layers="*")) as patch:
        found = []
        for strength in (0.0, 0.9):
            with Correction(
                patch, Presence([(1,), (5,)]), how="reweight", steps=(0, 1), strength=strength, tokens=(1, 5)
            ) as correct:
                cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
                order = MultiPipelineCallbacks([correct, cut] if first else [cut, correct])
                found.append(draw(pipe, num_inference_steps=3, callback_on_step_end=order))
        assert not np.allclose(found[0], found[1], atol=1e-4)
