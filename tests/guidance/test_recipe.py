# ruff: noqa: F811
"""Recipes: they correct as a correction set up by hand does, in every pipeline; what they cannot do they say, before a
step is drawn."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from tiny_models import _one_thread, build, draw, parts, psnr, tokenizer, tokenizer_2  # noqa: F401

import sdattn_fast
from sdattn_fast import Capture, Program, SalienceDropout
from sdattn_fast.guidance import (
    Binding,
    Correction,
    Presence,
    Recipe,
    Segregation,
    find_phrases,
    syntactic_pairs,
)  # fmt: skip
from sdattn_fast.guidance.recipe import RECIPES

CAPTION = "a red car and a blue cat"
GENTLE = Recipe(presence=1.0, strength=0.3, normalize=True, until=1.0)


def quiet(action: Callable[[], Any]) -> Any:
    """What it gives; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action()


# The settings of the paper, for Stable Diffusion.
ATTEND_AND_EXCITE = Recipe(
    presence=1.0, sharpness=100.0, targets={0.2: 0.5, 0.4: 0.8}, strength=20.0, normalize=False, until=0.5,
    corrections=None,
)  # fmt: skip


@pytest.mark.parametrize("name", [*RECIPES, "Attend-and-Excite"])
def test_a_recipe_is_its_corrections(name: str, build: Any, draw: Any) -> None:
    recipe, steps = Recipe.named(name) if name in RECIPES else ATTEND_AND_EXCITE, 10
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, recipe=name if name in RECIPES else recipe) as patch:
        picture = quiet(lambda: draw(pipe, CAPTION, num_inference_steps=steps))
        assert patch.left_out == ()
    phrases = find_phrases(CAPTION, pipe.tokenizer)
    nouns = [phrase.tokens("noun") for phrase in phrases]
    weighted = [
        (recipe.presence, Presence(nouns, sharpness=recipe.sharpness)),
        (recipe.segregation, Segregation(nouns)),
        (recipe.binding, Binding(syntactic_pairs(pipe.tokenizer, CAPTION, phrases))),
    ]

    class Score:
        def by_picture(self, seen: Any) -> torch.Tensor:
            return torch.stack([weight * score.by_picture(seen) for weight, score in weighted if weight]).sum(0)

        __call__ = by_picture

    # A correction after a step is one before the next. The targets are those of the steps 2 and 4.
    end = max(1, round(recipe.until * steps) - 1)
    how: dict[str, Any] = {
        "strength": recipe.strength,
        "normalize": recipe.normalize,
        "steps": (0, end),
        "layers": recipe.layers,
    }
    if recipe.targets:
        how["targets"] = {1: 0.5, 3: 0.8}
    if recipe.corrections is not None:
        how["every"] = -(-end // recipe.corrections)
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with Correction(patch, Score(), **how) as correct:
            by_hand = draw(pipe, CAPTION, num_inference_steps=steps, callback_on_step_end=correct)
    np.testing.assert_allclose(picture, by_hand, atol=1e-4)
    assert np.abs(picture - draw(pipe, CAPTION, num_inference_steps=steps)).max() > 1e-3


def test_presence_is_attend_and_excites() -> None:
    """And an unnormalized gradient step is its step: diffusers' own functions on plain attention probabilities."""
    from diffusers import StableDiffusionAttendAndExcitePipeline as AttendAndExcite

    from sdattn_fast.evaluation.peers.attention import KeptMaps
    from sdattn_fast.lab import load_pipeline

    pipe = load_pipeline()
    caption, tokens = "a red circle and a blue square", (3, 7)
    text = pipe.encode_prompt(caption, torch.device("cpu"), 1, False)[0]
    pipe.scheduler.set_timesteps(10)
    latents, t = torch.randn(1, 4, 16, 16), pipe.scheduler.timesteps[1]
    with KeptMaps(pipe.unet, (16, 16)) as kept:
        leaf = latents.clone().requires_grad_()
        pipe.unet(leaf, t, encoder_hidden_states=text)
        strongest = AttendAndExcite._compute_max_attention_per_index(kept.cross(), list(tokens))
        theirs = AttendAndExcite._update_latent(leaf, AttendAndExcite._compute_loss(strongest), 20.0).detach()

    seen: list[torch.Tensor] = []
    ours = []

    class Watched(Presence):
        def strongest(self, prediction: Any) -> list[torch.Tensor]:
            seen[:] = super().strongest(prediction)
            return seen

    with sdattn_fast.apply(pipe, capture=Capture(steps=())) as patch:
        correct = Correction(patch, Watched([(3,), (7,)], sharpness=100.0), normalize=False, strength=20.0)

        def after_a_step(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                ours.append(correct(pipe, step, t, {"latents": latents})["latents"] - latents)
            return tensors

        pipe(caption, num_inference_steps=10, output_type="latent", callback_on_step_end=after_a_step)
    torch.testing.assert_close(seen[0], torch.stack(strongest).detach(), atol=2e-4, rtol=2e-4)
    theirs = theirs - latents
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours[0], theirs, atol=2e-3 * theirs.abs().max().item(), rtol=1e-2)


@pytest.mark.parametrize(
    "name, how",
    [
        ("sd15", {"guidance_scale": 1.0}),
        ("sd15", {"num_images_per_prompt": 2}),
        ("sdxl", {}),
        ("inpaint", {}),
        ("img2img", {"strength": 0.6, "num_inference_steps": 5}),
        ("controlnet", {"guess_mode": True}),
        ("sdxl_controlnet", {}),
        ("pix2pix", {}),
    ],
)
def test_every_pipeline(name: str, how: dict[str, Any], build: Any, draw: Any) -> None:
    pipe = build(name)
    how = {"num_inference_steps": 4, **how}
    stock = draw(pipe, CAPTION, **how)
    with sdattn_fast.apply(pipe, recipe=replace(GENTLE, binding=1.0)) as patch:
        picture = quiet(lambda: draw(pipe, CAPTION, **how))
        assert patch.left_out == () and patch._wants_forwards == 1
    assert patch._wants_forwards == 0
    assert np.isfinite(picture).all()
    assert (np.abs(picture - stock).reshape(len(picture), -1).max(1) > 1e-3).all()
    np.testing.assert_allclose(draw(pipe, CAPTION, **how), stock, atol=1e-5)  # memory elsewhere may round otherwise


def test_in_bfloat16(build: Any) -> None:
    pipe = build("sd15")
    pipe.unet, pipe.text_encoder = (copy.deepcopy(x).to(torch.bfloat16) for x in (pipe.unet, pipe.text_encoder))
    how = {"num_inference_steps": 4, "output_type": "latent"}
    stock = pipe(CAPTION, generator=torch.Generator().manual_seed(0), **how).images
    with sdattn_fast.apply(pipe, recipe=GENTLE):
        latents = pipe(CAPTION, generator=torch.Generator().manual_seed(0), **how).images
    assert latents.dtype == torch.bfloat16 and bool(latents.isfinite().all()) and not torch.equal(latents, stock)


def test_pictures_of_a_batch_are_corrected_by_themselves(build: Any) -> None:
    pipe = build("sd15")
    prompts = [CAPTION, "very", "a dog"]

    def drawn(which: list[int], images: int = 1) -> np.ndarray:
        noise = [torch.Generator().manual_seed(10 * i + j) for i in which for j in range(images)]
        return pipe(
            [prompts[i] for i in which], num_inference_steps=4, generator=noise, num_images_per_prompt=images,
            output_type="np",
        ).images  # fmt: skip

    stock = drawn([0, 1, 2], 2)
    with sdattn_fast.apply(pipe, recipe=GENTLE) as patch:
        with pytest.warns(UserWarning, match="left out presence in 'very': it has no noun that names an object"):
            together = drawn([0, 1, 2], 2)
        assert patch.left_out == ("presence in 'very': it has no noun that names an object",)
        alone = drawn([2], 2)
        assert patch.left_out == ()
    np.testing.assert_allclose(together[4:], alone, atol=2e-3)
    np.testing.assert_allclose(together[2:4], stock[2:4], atol=1e-3)
    assert np.abs(together - stock)[[0, 1, 4, 5]].reshape(4, -1).max(1).min() > 1e-2


def test_beside_a_callback_of_the_users(build: Any, draw: Any) -> None:
    pipe = build("sd15")
    calls: list[tuple[int, list[str]]] = []

    def function(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append((step, sorted(tensors)))
        return tensors

    class Official(PipelineCallback):
        tensor_inputs = ("prompt_embeds",)

        def callback_fn(self, pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return function(pipe, step, t, tensors)

    def interrupting(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 0
        return tensors

    with sdattn_fast.apply(pipe, recipe=GENTLE):
        alone = draw(pipe, CAPTION, num_inference_steps=3)
        for callback, tensors, more in (
            (function, ["latents"], {}),
            (function, [], {"callback_on_step_end_tensor_inputs": []}),
            (function, ["prompt_embeds"], {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}),
            (Official(cutoff_step_ratio=None, cutoff_step_index=0), ["prompt_embeds"], {}),
        ):
            calls.clear()
            beside = draw(pipe, CAPTION, num_inference_steps=3, callback_on_step_end=callback, **more)
            np.testing.assert_allclose(beside, alone, atol=1e-5)
            assert calls == [(step, tensors) for step in range(3)], callback
        interrupted = draw(pipe, CAPTION, num_inference_steps=3, callback_on_step_end=interrupting)
    pipe._interrupt = False
    stock = draw(pipe, CAPTION, num_inference_steps=3, callback_on_step_end=interrupting)
    np.testing.assert_allclose(interrupted, stock, atol=1e-4)


def test_threads_and_copies(build: Any, draw: Any) -> None:
    pipe = build("sd15")
    prompts = [CAPTION, "a dog", "a cat and a green frog"]
    with sdattn_fast.apply(pipe, recipe=GENTLE) as patch:
        alone = [draw(pipe, prompt, num_inference_steps=3) for prompt in prompts]
        together: dict[int, np.ndarray] = {}

        def work(i: int) -> None:
            mine = copy.copy(pipe)
            mine.scheduler = copy.deepcopy(pipe.scheduler)
            mine.tokenizer = copy.deepcopy(pipe.tokenizer)  # transformers' are not safe for threads
            together[i] = draw(mine, prompts[i], num_inference_steps=3)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert patch._wants_forwards == 1
    for i in range(3):
        np.testing.assert_allclose(together[i], alone[i], atol=1e-5)


def test_the_layers_of_a_recipe(build: Any, draw: Any) -> None:
    """Its scores see their maps alone, its forwards end there, and the maps that the user asked for are whole."""
    pipe = build("sd15")
    down = replace(GENTLE, layers="down_blocks.*", strength=1.0)
    ran: list[None] = []
    watching = pipe.unet.conv_out.register_forward_hook(lambda *of_call: ran.append(None))

    def drawn(recipe: Recipe, capture: Capture | None = None) -> tuple[np.ndarray, sdattn_fast.Maps | None]:
        with sdattn_fast.apply(pipe, recipe=recipe, capture=capture) as patch:
            ran.clear()
            picture = quiet(lambda: draw(pipe, CAPTION, num_inference_steps=4))
            return picture, patch.maps if capture is not None else None

    try:
        picture, _ = drawn(down)
        assert len(ran) == 4
        same, maps = drawn(down, Capture())
        assert maps is not None and any(name.startswith("up_blocks") for name in maps)
        np.testing.assert_allclose(picture, same, atol=1e-5)  # memory elsewhere may round otherwise
        in_place_of, _ = drawn(replace(down, layers=None), Capture(layers="down_blocks.*"))
        of_all, _ = drawn(replace(down, layers=None))
    finally:
        watching.remove()
    np.testing.assert_allclose(picture, in_place_of, atol=1e-5)
    assert np.abs(picture - of_all).max() > 1e-3


def test_layers_that_a_recipe_has_not(build: Any, draw: Any) -> None:
    pipe = build("sd15")
    processors = {name: type(one) for name, one in pipe.unet.attn_processors.items()}
    with pytest.raises(ValueError, match=r"Recipe.layers: 'dawn' matches none of the .* layers; did you mean"):
        sdattn_fast.apply(pipe, recipe=replace(GENTLE, layers=["down_blocks.*", "dawn"]))
    assert {name: type(one) for name, one in pipe.unet.attn_processors.items()} == processors
    with sdattn_fast.apply(pipe, recipe=replace(GENTLE, layers="down_blocks.*"), capture=Capture(layers="up_blocks.*")):
        with pytest.raises(ValueError, match=r"layers, of the captured ones: 'down_blocks.*' matches none of the"):
            draw(pipe, CAPTION, num_inference_steps=4)


def test_with_a_program_and_maps(build: Any, draw: Any) -> None:
    pipe = build("sd15")
    program = Program(SalienceDropout(0.2), renormalize="content")
    with sdattn_fast.apply(pipe, recipe=replace(GENTLE, program=program)) as patch:
        own = draw(pipe, CAPTION)
        with pytest.raises(ValueError, match="maps: expected apply"):
            _ = patch.maps
    with sdattn_fast.apply(pipe, program, recipe=GENTLE, capture=Capture()) as patch:
        np.testing.assert_allclose(draw(pipe, CAPTION), own, atol=1e-5)
        maps = patch.maps
        assert maps.tokens == tuple(range(77)) and bool(torch.stack([x.isfinite().all() for x in maps.values()]).all())
    with pytest.raises(ValueError, match="program: the recipe has a program of its own"):
        sdattn_fast.apply(pipe, program, recipe=replace(GENTLE, program=program))
    for capture in (Capture(tokens=(1,)), Capture(reduce="none")):
        with pytest.raises(ValueError, match="capture: a recipe needs tokens=None"):
            sdattn_fast.apply(pipe, recipe="objects", capture=capture)


def test_objects_by_name(build: Any, draw: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, recipe=replace(GENTLE, objects=("cat", "ca", "zebra"))) as patch:
        of_cat = quiet(lambda: draw(pipe, CAPTION, num_inference_steps=3))
        with pytest.warns(UserWarning, match=r"it has none of \['cat', 'ca', 'zebra'\]"):
            draw(pipe, "a dog", num_inference_steps=3)
    cat = find_phrases(CAPTION, pipe.tokenizer, phrases=["cat"])[0].tokens()
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with Correction(patch, Presence([cat]), steps=(0, 2), strength=0.3) as correct:
            by_hand = draw(pipe, CAPTION, num_inference_steps=3, callback_on_step_end=correct)
    np.testing.assert_allclose(of_cat, by_hand, atol=1e-4)
    with sdattn_fast.apply(pipe, recipe=replace(GENTLE, objects=("car", "Car", "cat"))) as patch:
        words = patch.guide._words(pipe.tokenizer, "a car, a cat and a car", [])
        assert len(words.objects) == 3 == len(set(words.objects))
        assert len(patch.guide._words(pipe.tokenizer, CAPTION, []).objects) == 2


def test_objects_in_scripts_without_spaces() -> None:
    from sdattn_fast.guidance.recipe_guide import _named
    from sdattn_fast.lab import load_pipeline

    tokenizer = load_pipeline().tokenizer
    prompt = "一只猫和一只青蛙"
    assert [p.text for p in _named(prompt, ("猫", "青蛙", "狗"), tokenizer)] == ["猫", "青蛙"]
    assert [p.text for p in _named("かわいいねこ", ("ねこ",), tokenizer)] == ["ねこ"]


def test_words_of_the_picture_are_no_objects(build: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, recipe="objects") as patch:
        words = patch.guide._words(pipe.tokenizer, "photos of a cat on a white background, 8k, masterpiece", [])
        assert words.objects == [find_phrases("photos of a cat", pipe.tokenizer)[-1].tokens("noun")]


def test_what_is_left_out_is_said(build: Any, draw: Any) -> None:
    pipe = build("sd15")
    embeds, negative = pipe.encode_prompt(CAPTION, "cpu", 1, True)
    stock = draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    long = "a cat and " + "very " * 20 + "blue dog"
    with sdattn_fast.apply(pipe, recipe="both") as patch:
        with pytest.warns(UserWarning, match="left out all corrections: the call has prompt_embeds"):
            picture = draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
        np.testing.assert_allclose(picture, stock, atol=1e-5)
        with pytest.warns(UserWarning, match="there is one step"):
            draw(pipe, CAPTION, num_inference_steps=1)
        assert patch.left_out == ("all corrections: there is one step, and a recipe acts between steps",)
        with pytest.warns(UserWarning, match="blue dog', for which the text encoder has no room"):
            draw(pipe, long)
        with pytest.warns(UserWarning, match="binding in 'a dog': no noun of it has a modifier"):
            draw(pipe, "a dog")
        assert any("segregation in 'a dog': it has fewer than two nouns" in reason for reason in patch.left_out)
        for empty in ("", ["", ""]):
            with pytest.warns(UserWarning, match="presence in ''"):
                draw(pipe, empty)
        assert len(patch.left_out) == 6
        with torch.inference_mode(), pytest.raises(RuntimeError, match="recipe: it needs gradients"):
            draw(pipe, CAPTION)
        with pytest.warns(UserWarning, match="the UNet runs outside a call of the patched pipeline"):
            pipe.unet(torch.randn(1, 4, 16, 16), 5, encoder_hidden_states=embeds)


def test_a_gradient_that_is_not_finite_leaves_the_picture(build: Any) -> None:
    pipe = build("sd15")

    class Overflows(Presence):
        def by_picture(self, seen: Any) -> torch.Tensor:
            return super().by_picture(seen) * torch.tensor([1.0, float("inf")])

    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    how = {"num_inference_steps": 3, "output_type": "latent"}
    stock = pipe([CAPTION] * 2, generator=[g.clone_state() for g in noise], **how).images
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        for normalize in (True, False):
            with Correction(patch, Overflows([(1,)]), normalize=normalize, strength=0.5, steps=(0, 2)) as correct:
                with pytest.warns(UserWarning, match="correction was not finite"):
                    latents = pipe(
                        [CAPTION] * 2, generator=[g.clone_state() for g in noise], callback_on_step_end=correct, **how
                    ).images
            assert bool(latents.isfinite().all())
            torch.testing.assert_close(latents[1], stock[1], atol=1e-4, rtol=1e-4)
            assert not torch.equal(latents[0], stock[0])


def test_every_nth_step(build: Any, draw: Any) -> None:
    pipe = build("sd15")
    changed = []
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with Correction(patch, Presence([(3,)]), steps=(1, 7), every=3) as correct:

            def watched(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                after = correct(pipe, step, t, tensors)
                changed.append(after["latents"] is not tensors["latents"])
                return after

            draw(pipe, num_inference_steps=8, callback_on_step_end=watched)
    assert [step for step, there in enumerate(changed) if there] == [1, 4]


@pytest.mark.parametrize(
    "name, options, read",
    [
        ("HeunDiscreteScheduler", {}, [False, True] * 4),
        ("KDPM2DiscreteScheduler", {}, [False, True] * 4),
        ("PNDMScheduler", {"skip_prk_steps": True}, [False] + [True] * 5),
        ("PNDMScheduler", {}, [False, False, False, True] * 3 + [True] * 2),
        ("DPMSolverMultistepScheduler", {}, [True] * 5),
        ("EulerAncestralDiscreteScheduler", {}, [True] * 5),
        ("UniPCMultistepScheduler", {}, [True] * 5),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_which_steps_read_the_latents(name: str, options: Any, read: list[bool]) -> None:
    """What is added to the latents after a step is in those after the next one, or is lost; a correction knows which.
    The model's outputs are the same, so that nothing else tells the two apart."""
    import diffusers

    from sdattn_fast.guidance.correction import _reads_latents

    def last(changed: int | None, count: int) -> tuple[torch.Tensor, bool]:
        scheduler = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, **options)
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(0)
        latents, says = torch.randn(1, 4, 4, 4, generator=generator), True
        noise = {"generator": torch.Generator().manual_seed(1)} if "Ancestral" in name else {}
        for step, t in enumerate(scheduler.timesteps[:count]):
            scheduler.scale_model_input(latents, t)
            output = torch.randn(1, 4, 4, 4, generator=generator)
            latents = scheduler.step(output, t, latents, **noise).prev_sample
            if step == changed:
                latents, says = latents + 1.0, _reads_latents(scheduler)
        return latents, says

    for step, expected in enumerate(read):
        (plain, _), (moved, says) = last(None, step + 2), last(step, step + 2)
        assert says is expected is bool((moved - plain).abs().max() > 0.1), step


def test_a_correction_waits_for_a_step_that_reads_it(build: Any) -> None:
    from diffusers import HeunDiscreteScheduler

    pipe = build("sd15")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    changed = []
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with Correction(patch, Presence([(3,)]), steps=(0, 8), every=2, targets={4: 0.99}, repeats=2) as correct:

            def watched(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                after = correct(pipe, step, t, tensors)
                size = (after["latents"] - tensors["latents"]).square().mean().sqrt().item()
                changed.append(round(size / 0.05, 1))
                return after

            pipe(CAPTION, num_inference_steps=6, output_type="latent", callback_on_step_end=watched)
    assert [step for step, size in enumerate(changed) if size] == [1, 3, 5, 7]
    assert changed[1] == 1.0 and changed[5] > 1.5  # two changes


def test_a_correction_beside_another_ones_attention(build: Any) -> None:
    pipe = build("sd15")

    def drawn(recipe: Recipe | None, strength: float) -> torch.Tensor:
        with sdattn_fast.apply(pipe, capture=Capture(), recipe=recipe) as patch:
            score = Presence([(5, 6, 7)])
            with Correction(patch, score, how="reweight", strength=strength, steps=(0, 3)) as correct:
                latents = pipe(
                    CAPTION, num_inference_steps=4, output_type="latent", callback_on_step_end=correct,
                    generator=torch.Generator().manual_seed(0),
                ).images  # fmt: skip
            assert not patch.current_call.bias
        return latents

    nothing = replace(GENTLE, strength=0.0)
    assert (drawn(None, 1.0) - drawn(None, 0.0)).abs().max() > 1e-2
    torch.testing.assert_close(drawn(nothing, 1.0), drawn(None, 1.0), atol=1e-4, rtol=1e-4)


def test_two_corrections_of_the_attention_do_not_pile_up(build: Any) -> None:
    """Each takes back its own at the next step, whichever comes first."""
    from diffusers.callbacks import MultiPipelineCallbacks

    pipe = build("sd15")
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        how: dict[str, Any] = {"how": "reweight", "strength": 0.5, "steps": (0, 9)}
        left = []

        class Look:
            tensor_inputs = ("latents",)

            def __call__(self, pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                left.append(max((x.abs().max().item() for x in patch.current_call.bias.values()), default=0.0))
                return tensors

        with Correction(patch, Presence([(3,)]), tokens=(3,), **how) as one:
            with Correction(patch, Presence([(3,)]), tokens=(3,), **how) as other:
                pipe(
                    CAPTION, num_inference_steps=8, output_type="latent", generator=torch.Generator().manual_seed(0),
                    callback_on_step_end=MultiPipelineCallbacks([one, other, Look()]),
                )  # fmt: skip
    # Two of them, and not two more with every step.
    assert len(left) == 8 and max(left[:7]) < 3 * left[0]


def test_a_patch_that_is_removed_or_watches_another_pipeline(build: Any, draw: Any) -> None:
    import diffusers

    pipe, stock = build("sd15"), draw(build("sd15"), CAPTION, num_inference_steps=4)
    patch = sdattn_fast.apply(pipe, recipe=GENTLE)

    def removing(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        patch.remove()
        return tensors

    picture = draw(pipe, CAPTION, num_inference_steps=4, callback_on_step_end=removing)
    np.testing.assert_allclose(picture, stock, atol=1e-4)
    components = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    with sdattn_fast.apply(pipe, recipe=GENTLE) as patch:
        with pytest.raises(ValueError, match="callback_on_step_end; StableDiffusionSAG"):
            patch.watch(diffusers.StableDiffusionSAGPipeline(**components, requires_safety_checker=False))
        with pytest.raises(TypeError, match="callback_on_step_end: expected a dict from it, got NoneType"):
            draw(pipe, CAPTION, callback_on_step_end=lambda *args: None)
        with patch.call():
            with pytest.warns(UserWarning, match="presence in 'very'"):
                draw(pipe, "very")
            draw(pipe, CAPTION)
            assert patch.left_out == ()
        with pytest.raises(ValueError, match="prompt"):
            pipe(num_inference_steps=2)


def test_text_that_is_not_known_is_drawn(build: Any, draw: Any) -> None:
    """A recipe needs known prompts where it corrects, and nowhere else."""
    pipe = build("sd15")
    unknown = pipe.encode_prompt("zzz", "cpu", 1, True)
    swapped = torch.cat([unknown[1], unknown[0]]) + 1.0

    def swap(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "prompt_embeds": swapped} if step == 2 else tensors

    how = {
        "num_inference_steps": 5,
        "callback_on_step_end": swap,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with sdattn_fast.apply(pipe, recipe=replace(GENTLE, until=0.4)):
        assert np.isfinite(draw(pipe, CAPTION, **how)).all()


def test_arguments_that_do_not_go_with_a_recipe(build: Any) -> None:
    import diffusers

    pipe = build("sd15")
    with pytest.raises(ValueError, match="active: a recipe finds"):
        sdattn_fast.apply(pipe, recipe="objects", active=torch.tensor([False, True]))
    with pytest.raises(ValueError, match="fold: a recipe needs gradients"):
        sdattn_fast.apply(pipe, recipe="objects", fold="always")
    with pytest.raises(
        TypeError, match=r"program: expected a sdattn_fast.Program.*got 'objects'; the name of a recipe"
    ):
        sdattn_fast.apply(pipe, "objects")
    pag = diffusers.StableDiffusionPAGPipeline(
        **pipe.components, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    with pytest.raises(ValueError, match="perturbs it"):
        sdattn_fast.apply(pag, recipe="objects")

    class Windows(type(pipe)):  # type: ignore[misc]
        def get_views(self) -> None:
            """Of a panorama."""

    windows = copy.copy(pipe)
    windows.__class__ = Windows
    with pytest.raises(ValueError, match="in windows"):
        sdattn_fast.apply(windows, recipe="objects")


def test_pipelines_that_cannot_carry_a_recipe(build: Any) -> None:
    pipe = build("sd15")
    with pytest.raises(TypeError, match="recipe: expected a pipeline"):
        sdattn_fast.apply(pipe.unet, recipe="objects")

    class Old(type(pipe)):  # type: ignore[misc]
        def __call__(self, prompt: str) -> None:
            """No callback."""

    class Video(type(pipe)):  # type: ignore[misc]
        def __call__(self, prompt: str, num_frames: int, callback_on_step_end: Any = None) -> None:
            """Frames."""

    for kind, message in ((Old, "callback_on_step_end"), (Video, "draws videos")):
        other = copy.copy(pipe)
        other.__class__ = kind
        with pytest.raises(ValueError, match=message):
            sdattn_fast.apply(other, recipe="objects")
    none = copy.copy(pipe)
    none.tokenizer = None
    with pytest.raises(ValueError, match="recipe: expected a pipeline with a tokenizer"):
        sdattn_fast.apply(none, recipe="objects")
    with pytest.raises(ValueError, match="with encode_prompt"):
        sdattn_fast.apply(SimpleNamespace(unet=pipe.unet, tokenizer=pipe.tokenizer), recipe="objects")
    with pytest.raises(
        ValueError, match="recipe: expected one of 'objects', 'binding', 'both', 'fast' or a Recipe, got 'x'"
    ):
        sdattn_fast.apply(pipe, recipe="x")
    with pytest.raises(TypeError, match="recipe: expected a name"):
        sdattn_fast.apply(pipe, recipe=3)  # type: ignore[arg-type]
    assert not hasattr(pipe.unet, "_sdattn_fast_watched")
    sdattn_fast.apply(pipe).remove()  # nothing was left in place


@pytest.mark.parametrize(
    "count, corrections, steps, every, targets",
    [
        (50, None, (0, 24), 1, {9: 0.5, 19: 0.8}),
        (50, 8, (0, 24), 3, {9: 0.5, 18: 0.8}),
        (20, None, (0, 9), 1, {3: 0.5, 7: 0.8}),
        (20, 4, (0, 9), 3, {3: 0.5, 6: 0.8}),
        (4, 4, (0, 1), 1, {0: 0.8}),
        (2, None, (0, 1), 1, {0: 0.8}),
    ],
)
def test_the_steps_of_a_recipe(
    count: int, corrections: int | None, steps: Any, every: int, targets: dict[int, float], build: Any
) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, recipe=replace(ATTEND_AND_EXCITE, corrections=corrections)) as patch:
        correction = patch.guide.begin(pipe, {"prompt": CAPTION})._for_steps(count)
    assert (correction.steps, correction.every, correction.targets) == (steps, every, targets)


def test_recipes_are_values() -> None:
    recipe = Recipe(presence=1, targets={0.4: 1, 0.2: 0.5}, until=0.5, objects=["cat"])
    assert recipe.targets == ((0.2, 0.5), (0.4, 1.0)) and recipe.objects == ("cat",)
    assert hash(recipe) == hash(replace(recipe)) and copy.deepcopy(recipe) == recipe != replace(recipe, corrections=2)
    assert pickle.loads(pickle.dumps(recipe)) == recipe == Recipe(**{**asdict(recipe), "program": Program()})


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({}, ValueError, "presence, segregation or binding greater than 0"),
        ({"presence": -1.0}, ValueError, r"Recipe.presence: expected a number >= 0, got -1"),
        ({"presence": "1"}, TypeError, "Recipe.presence: expected a number, got "),
        ({"presence": 1, "strength": float("nan")}, ValueError, "Recipe.strength: expected a finite number, got nan"),
        ({"presence": 1, "until": 0.0}, ValueError, r"Recipe.until: expected a share in \(0, 1\], got 0"),
        ({"presence": 1, "corrections": 0}, ValueError, "Recipe.corrections: expected at least 1, got 0"),
        ({"presence": 1, "repeats": 1.0}, TypeError, "Recipe.repeats: expected an int, got float"),
        ({"presence": 1, "targets": {0.5: 1.0}}, ValueError, r"Recipe.targets: .* less than until, 0.35, got 0.5"),
        ({"presence": 1, "targets": ((0.2,),)}, TypeError, r"Recipe.targets: expected {share: score}, got \(\(0.2"),
        ({"presence": 1, "targets": {"a": 1}}, TypeError, "Recipe.targets: expected a number, got "),
        ({"presence": 1, "targets": ((0.2, 1), (0.2, 2))}, ValueError, "Recipe.targets: expected each share once"),
        ({"presence": 1, "targets": [0.5]}, TypeError, r"Recipe.targets: expected {share: score}, got \[0.5"),
        ({"presence": 1, "sharpness": 0.0}, ValueError, "Recipe.sharpness: expected a number > 0 or None, got 0"),
        ({"presence": 1, "layers": 3}, TypeError, r"Recipe.layers: expected None, names or patterns, got 3 \(int\)"),
        ({"presence": 1, "normalize": 1}, TypeError, "Recipe.normalize: expected a bool, got int"),
        ({"presence": 1, "program": None}, TypeError, "Recipe.program: expected a sdattn_fast.Program"),
        ({"presence": 1, "objects": "cat"}, TypeError, "Recipe.objects: expected a sequence of str"),
        ({"presence": 1, "objects": [""]}, ValueError, "Recipe.objects: expected words of the prompt"),
        ({"presence": 1, "objects": []}, ValueError, "Recipe.objects: expected words of the prompt"),
    ],
)
def test_bad_recipes(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe(**changes)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"every": True}, TypeError, "every: expected an int, got bool"),
        ({"every": 3, "targets": {4: 0.5}}, ValueError, "targets: expected every 3-th step from 0 on, got 4"),
        ({"normalize": 0}, TypeError, "normalize: expected a bool, got int"),
        ({"layers": "dawn"}, ValueError, "layers: 'dawn' matches none of the"),
        ({"normalize": False, "how": "reweight"}, ValueError, "normalize: False goes with how='gradient'"),
        ({"normalize": False, "score": lambda seen: 0}, TypeError, "normalize=False needs a score with by_picture"),
    ],
)
def test_bad_corrections(changes: dict[str, Any], error: type[Exception], message: str, build: Any) -> None:
    with sdattn_fast.apply(build("sd15"), capture=Capture()) as patch, pytest.raises(error, match=message):
        Correction(**{"patch": patch, "score": Presence([(1,)]), **changes})


def test_presence_of_some_pictures_and_its_sharpness() -> None:
    for sharpness, error in ((0.0, ValueError), (float("inf"), ValueError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="sharpness: expected"):
            Presence([(1,)], sharpness=sharpness)
    with pytest.raises(ValueError, match="at least one phrase"):
        Presence([[], []])
    from sdattn_fast.guidance import Seen
    from sdattn_fast.patching import Maps

    maps = torch.rand(2, 5, 4, 4)
    seen = Seen(maps, maps, 0, Maps({"layer": maps}, (0, 1, 2, 3, 4), (4, 4)))
    both = Presence([[(1,), (2,)], []]).by_picture(seen)
    assert both[1] == 1
    torch.testing.assert_close(both[0], Presence([[(1,), (2,)], [(3,)]]).by_picture(seen)[0])
    some = Seen(maps, maps, 0, Maps({"layer": maps[:, 1:]}, (1, 2, 3, 4), (4, 4)))
    with pytest.raises(ValueError, match="sharpness needs the maps of all tokens"):
        Presence([[(1,)], []], sharpness=100.0).by_picture(some)
