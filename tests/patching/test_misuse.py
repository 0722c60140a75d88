"""Patches that are taken off, or put on, while a picture is drawn; and prompts that no text encoder can read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sdattn_fast
from sdattn_fast import Capture, Program, SalienceDropout
from sdattn_fast.patching.words import words_of

DROPS = Program(dropout=SalienceDropout(0.3))


def test_a_patch_removed_between_two_steps(build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    """Its program is in the first steps alone, as an empty one from then on would have it."""
    pipe = build("sd15")
    stock = draw(pipe, num_inference_steps=4)

    def removed(pipe: Any, step: int, timestep: Any, inputs: Any) -> Any:
        if step == 1:
            patch.remove()
        return inputs

    def muted(pipe: Any, step: int, timestep: Any, inputs: Any) -> Any:
        if step == 1:
            patch.update(active=torch.zeros(2, dtype=torch.bool))
        return inputs

    patch = sdattn_fast.apply(pipe, DROPS, capture=Capture())
    half = draw(pipe, num_inference_steps=4, callback_on_step_end=removed)
    assert not patch.installed
    assert np.array_equal(draw(pipe, num_inference_steps=4), stock)
    with sdattn_fast.apply(pipe, DROPS) as patch:
        whole = draw(pipe, num_inference_steps=4)
        expected = draw(pipe, num_inference_steps=4, callback_on_step_end=muted)
    assert psnr(half, expected) > 90
    assert psnr(half, stock) < 60 and psnr(half, whole) < 60


def test_a_patch_applied_between_two_steps(build: Callable[[str], Any], draw: Any) -> None:
    """It did not hear the prompt being encoded, and says so."""
    pipe = build("sd15")
    stock, made = draw(pipe, num_inference_steps=4), []

    def applied(pipe: Any, step: int, timestep: Any, inputs: Any) -> Any:
        made.append(sdattn_fast.apply(pipe, DROPS))
        return inputs

    with pytest.raises(ValueError, match="are not what this pipeline's encode_prompt returned"):
        draw(pipe, num_inference_steps=4, callback_on_step_end=applied)
    with pytest.raises(ValueError, match="is patched already; call remove"):
        sdattn_fast.apply(pipe.unet, layers="mid*")
    made[0].remove()
    assert np.array_equal(draw(pipe, num_inference_steps=4), stock)


def test_a_prompt_of_ten_thousand_characters(build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    pipe, prompt = build("sd15"), "a red car and a dog " * 500
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        assert psnr(draw(pipe, prompt), draw(pipe, prompt[:800])) > 90
        words = list(patch.maps.per_word(prompt))
    assert words[:6] == ["a", "red", "car", "and", "a (2)", "dog"]
    tokens = sum(len(indices) for indices in words_of(pipe.tokenizer, prompt).values())
    assert 70 <= tokens <= 75
    with sdattn_fast.apply(pipe, recipe="objects") as patch, pytest.warns(UserWarning, match="the recipe left out"):
        draw(pipe, prompt)
    assert max(map(len, patch.left_out)) < 200
    assert any(re.match(r"'.*\.\.\.'", said) for said in patch.left_out)
