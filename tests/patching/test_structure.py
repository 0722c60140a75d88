"""The structure callback in pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sdattn_fast
from sdattn_fast import Capture
from sdattn_fast.guidance.structure import Structure


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "inpaint"])
@pytest.mark.parametrize("preview", ["latent", "decoded"])
def test_as_a_callback(architecture: str, preview: str, build: Callable[[str], Any], draw: Any) -> None:
    pipe = build(architecture)
    hooks = len(pipe.unet._forward_hooks)
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        stock = draw(pipe, num_inference_steps=3)
        calls = []
        with Structure(patch, "a red car", words=["red", "car"], steps=(1,), preview=preview) as structure:

            def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
                after = structure(pipe, step, timestep, inputs)
                calls.append(bool((after["latents"] != inputs["latents"]).any()))
                return after

            changed = draw(pipe, num_inference_steps=3, callback_on_step_end=callback)
        assert calls == [False, True, True], "step 1, and the last before decoding"
        assert np.isfinite(changed).all() and not np.array_equal(stock, changed)
        assert np.array_equal(draw(pipe, num_inference_steps=3), stock)
        with (
            pytest.raises(ValueError, match="words: 'dog' is not among"),
            Structure(patch, "a car", words=["dog"]) as s,
        ):
            draw(pipe, "a car", callback_on_step_end=s)
    assert len(pipe.unet._forward_hooks) == hooks


def test_several_prompts(build: Callable[[str], Any], draw: Any) -> None:
    """Two prompts, two pictures of each, and objects by prompt."""
    pipe, prompts = build("sd15"), ["a red car", "a dog"]
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with Structure(patch, prompts, words=[["car"], ["a", "dog"]]) as structure:
            together = draw(pipe, prompts, num_images_per_prompt=2, callback_on_step_end=structure)
        stock = draw(pipe, prompts, num_images_per_prompt=2)
        assert all(not np.array_equal(a, b) for a, b in zip(together, stock, strict=True))
        with Structure(patch, prompts, words=[["car"], ["car"]]) as structure:
            with pytest.raises(ValueError, match="words: 'car' is not among"):
                draw(pipe, prompts, callback_on_step_end=structure)
        for wrong in (3, [], ["a", 3]):
            with pytest.raises(TypeError, match="prompt: expected"):
                Structure(patch, wrong)  # type: ignore[arg-type]
        for wrong_words in ("car", [["car"]]):
            with pytest.raises(TypeError, match="words: expected"):
                Structure(patch, prompts, words=wrong_words)


@pytest.mark.parametrize("prompt, words", [("a red car", []), ("绿色的圆圈", None), ("", None)])
def test_without_words_nothing_is_smoothed(
    prompt: str, words: list[str] | None, build: Callable[[str], Any], draw: Any
) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        stock = draw(pipe, prompt)
        with Structure(patch, prompt, words=words) as structure:
            assert np.array_equal(draw(pipe, prompt, callback_on_step_end=structure), stock)


def test_as_many_words_as_there_are_labels(build: Callable[[str], Any], draw: Any) -> None:
    """Refused before anything is drawn; a comma is no word."""
    pipe = build("sd15")
    letters = [chr(ord("a") + i % 26) for i in range(32)]
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        for prompt, words in ((" ".join(letters), None), ("a", ["a"] * 32), (["a", " ".join(letters)], None)):
            with pytest.raises(ValueError, match="words: expected at most 31 of a prompt's, got 32: name the objects"):
                Structure(patch, prompt, words=words)
        few = ", ".join(letters[:31])
        with Structure(patch, few) as structure:
            assert np.isfinite(draw(pipe, few, callback_on_step_end=structure)).all()
        with Structure(patch, " ".join(letters), words=["A", "z"]) as structure:
            assert np.isfinite(draw(pipe, " ".join(letters), callback_on_step_end=structure)).all()


def test_a_pipeline_without_a_tokenizer(build: Callable[[str], Any]) -> None:
    pipe = build("sd15")
    pipe.tokenizer = None
    with (
        sdattn_fast.apply(pipe, capture=Capture()) as patch,
        pytest.raises(ValueError, match="patch: expected a pipeline with a tokenizer, got StableDiffusionPipeline"),
    ):
        Structure(patch, "a car")
