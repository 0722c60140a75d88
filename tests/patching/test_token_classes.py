"""Which rows are prompts and which tokens are content, for every way that text reaches a UNet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sdattn_fast
from sdattn_fast import Program, SalienceDropout
from sdattn_fast.patching.token_classes import protected_tokens

DROPOUT = Program(dropout=SalienceDropout(0.3))


def test_bos_and_everything_from_the_first_eos_are_protected() -> None:
    ids = torch.tensor([[7, 1, 2, 9, 9, 9], [7, 1, 9, 0, 0, 1], [7, 9, 9, 9, 9, 9]])
    expected = torch.tensor([[1, 0, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(protected_tokens(ids, bos=7, eos=9), expected)
    # A tokenizer whose BOS and EOS are one token.
    assert protected_tokens(torch.tensor([[9, 1, 9, 0]]), bos=9, eos=9).tolist() == [[True, False, True, True]]


@pytest.mark.parametrize(
    ("architecture", "keywords", "active", "content"),
    [
        ("sd15", {"prompt": "a red car"}, "01", [0, 7]),
        ("sd15", {"prompt": "a red car", "negative_prompt": "ugly"}, "01", [0, 7]),
        ("sd15", {"prompt": "a red car", "guidance_scale": 1.0}, "1", [7]),
        ("sd15", {"prompt": ["a red car", "cat"]}, "0011", [0, 0, 7, 3]),
        ("sd15", {"prompt": ["car", "cats"], "num_images_per_prompt": 2}, "00001111", [0, 0, 0, 0, 3, 3, 4, 4]),
        ("sd15", {"prompt": "x" * 200}, "01", [0, 75]),
        ("sd15", {"prompt": ""}, "01", [0, 0]),
        ("sdxl", {"prompt": "a red car"}, "01", [0, 7]),
        ("sdxl", {"prompt": "a red car", "negative_prompt": "ugly"}, "01", [0, 7]),
        ("sdxl", {"prompt": "cat", "prompt_2": "a red car"}, "01", [0, 7]),
        ("sdxl", {"prompt": "cat", "num_images_per_prompt": 2, "guidance_scale": 1.0}, "11", [3, 3]),
        ("pix2pix", {"prompt": "a red car"}, "100", [7, 0, 0]),
        ("pix2pix", {"prompt": "a red car", "negative_prompt": "ugly"}, "100", [7, 0, 0]),
        ("controlnet", {"prompt": "a red car"}, "01", [0, 7]),
        ("inpaint", {"prompt": "a red car"}, "01", [0, 7]),
    ],
)
def test_pipelines_say_it_all(
    architecture: str, keywords: dict[str, Any], active: str, content: list[int], build: Callable[[str], Any], draw: Any
) -> None:
    pipe = build(architecture)
    with sdattn_fast.apply(pipe, DROPOUT) as patch:
        draw(pipe, num_inference_steps=1, **keywords)
        got_active, got_content = _seen(patch)
    assert "".join(str(int(x)) for x in got_active) == active
    assert got_content == content


def test_guess_mode_gives_the_controlnet_the_prompts_alone(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("controlnet")
    with sdattn_fast.apply(pipe, DROPOUT) as patch:
        draw(pipe, guess_mode=True)
        assert _seen(patch, model=0) == ([False, True], [0, 7])
        assert _seen(patch, model=1) == ([True], [7])


def test_embeddings_encoded_by_the_patched_pipe_are_known(build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, DROPOUT) as patch:
        expected = draw(pipe, "a red car")
        positive, negative = pipe.encode_prompt("a red car", "cpu", 1, True)
        pipe.encode_prompt("something else", "cpu", 1, True)
        got = draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
        assert _seen(patch) == ([False, True], [0, 7])
    assert psnr(expected, got) > 100


def test_foreign_embeddings_ask_for_their_token_classes(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    embeds = {"prompt_embeds": torch.randn(1, 77, 32), "negative_prompt_embeds": torch.randn(1, 77, 32)}
    with sdattn_fast.apply(pipe, DROPOUT) as patch:
        with pytest.raises(ValueError, match=r"protected: prompt_embeds came without their tokens.*protected="):
            draw(pipe, None, **embeds)
        protected = torch.ones(77, dtype=torch.bool)
        protected[1:5] = False
        patch.update(protected=protected)
        draw(pipe, None, **embeds)
        assert _seen(patch) == ([False, True], [0, 4])
    # Plain attention does not care, and its maps want the prompts' entries alone.
    with sdattn_fast.apply(pipe, capture=sdattn_fast.Capture(layers="*")) as patch:
        draw(pipe, None, **embeds)
        assert all(len(maps) == 1 for maps in patch.maps.values())
        patch.update(gate=torch.ones(77))
        with pytest.raises(ValueError, match="protected: prompt_embeds came without their tokens"):
            draw(pipe, None, **embeds)


def test_rows_from_elsewhere_are_refused_with_what_to_pass(build: Callable[[str], Any]) -> None:
    pipe = build("sd15")
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.randn(2, 77, 32)}
    with sdattn_fast.apply(pipe, DROPOUT) as patch, torch.no_grad():
        with pytest.raises(ValueError, match=r"encoder_hidden_states: its rows.*active=.*protected="):
            pipe.unet(**inputs)
        protected = torch.zeros(77, dtype=torch.bool)
        patch.update(active=torch.tensor([True, False]), protected=protected)
        pipe.unet(**inputs)
        assert _seen(patch) == ([True, False], [77, 0])


def test_guidance_may_stop_between_steps(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    seen = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(_seen(patch))
        pipe._guidance_scale = 0.0
        return {**tensors, "prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]} if step == 0 else tensors

    with sdattn_fast.apply(pipe, DROPOUT) as patch:
        draw(pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [([False, True], [0, 7]), ([True], [7])]


def test_plain_rows_are_looked_at_again_once_a_gate_comes(build: Callable[[str], Any]) -> None:
    pipe = build("sd15")
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.randn(2, 77, 32)}
    with sdattn_fast.apply(pipe) as patch, torch.no_grad():
        pipe.unet(**inputs)
        patch.update(gate=torch.ones(77))
        with pytest.raises(ValueError, match="encoder_hidden_states: its rows"):
            pipe.unet(**inputs)


def test_a_bare_unet_is_all_content(parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    with sdattn_fast.apply(unet, DROPOUT) as patch, torch.no_grad():
        unet(torch.randn(2, 4, 8, 8), 1, torch.randn(2, 77, 32))
        assert _seen(patch) == ([True, True], [77, 77])


def test_textual_inversion_with_several_vectors(build: Callable[[str], Any], draw: Any, parts: dict[str, Any]) -> None:
    pipe = build("sd15")
    tokenizer, encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    pipe.load_textual_inversion({"<thing>": torch.randn(3, 32)}, token="<thing>")
    with sdattn_fast.apply(pipe, DROPOUT) as patch:
        draw(pipe, "red <thing>")
        assert _seen(patch) == ([False, True], [0, 6])


def test_a_new_prompt_is_seen_and_an_edit_in_place_too(parts: dict[str, Any], build: Callable[[str], Any]) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, DROPOUT) as patch, torch.no_grad():
        first, negative = pipe.encode_prompt("a red car", "cpu", 1, True)
        second, _ = pipe.encode_prompt("cat", "cpu", 1, True)
        text = torch.cat([negative, first])
        sample = torch.randn(2, 4, 8, 8)
        pipe.unet(sample, 1, text)
        assert _seen(patch) == ([False, True], [0, 7])
        text[1] = second[0]
        pipe.unet(sample, 1, text)
        assert _seen(patch) == ([False, True], [0, 3])
        text.copy_(torch.cat([second, negative]))
        pipe.unet(sample, 1, text)
        assert _seen(patch) == ([True, False], [3, 0])
    with sdattn_fast.apply(pipe, DROPOUT) as patch, torch.inference_mode():
        first, negative = pipe.encode_prompt("a red car", "cpu", 1, True)
        text = torch.cat([negative, first])
        pipe.unet(sample, 1, text)
        text.copy_(text.flip(0))
        pipe.unet(sample, 1, text)
        assert _seen(patch) == ([True, False], [7, 0])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((77,), [1.0] * 4 + [5.0] * 4),
        ((1, 77), [1.0] * 4 + [5.0] * 4),
        ((2, 77), [1.0] * 4 + [5.0, 5.0, 6.0, 6.0]),
        ((4, 77), [1.0] * 4 + [5.0, 6.0, 7.0, 8.0]),
        ((8, 77), [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]),
        ((2, 2, 77), [1.0] * 4 + [5.0, 5.0, 6.0, 6.0]),
    ],
)
def test_gates_for_prompts_images_or_the_whole_batch(
    shape: tuple[int, ...], expected: list[float], build: Callable[[str], Any], draw: Any
) -> None:
    pipe = build("sd15")
    gate = torch.ones(shape) * 5.0
    if len(shape) > 1:
        gate += torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    with sdattn_fast.apply(pipe, DROPOUT, gate=gate) as patch:
        # Equal prompts keep their own gates.
        draw(pipe, ["cat", "cat"], num_images_per_prompt=2, num_inference_steps=1)
        side = next(iter(patch._models[0].text.cache.values())).prepared.side
    assert side.gate[:, 0, 1].tolist() == expected


def test_a_gate_of_no_fitting_shape(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    with (
        sdattn_fast.apply(pipe, DROPOUT, gate=torch.ones(3, 77)),
        pytest.raises(
            ValueError, match=r"gate: expected \(77,\), \(1, 77\) for the prompts or \(2, 77\).*got \(3, 77\)"
        ),
    ):
        draw(pipe)
    with (
        sdattn_fast.apply(pipe, DROPOUT, active=torch.tensor([True])),
        pytest.raises(ValueError, match=r"active: expected shape \(2,\)"),
    ):
        draw(pipe)


def _seen(patch: Any, model: int = 0) -> tuple[list[bool], list[int]]:
    """(active, number of content tokens of each active entry) of the calls that were prepared."""
    (side, *_) = [ready.prepared.side for ready in patch._models[model].text.cache.values()]
    active: Tensor = torch.ones(side.batch, dtype=torch.bool) if side.active is None else side.active
    protected = torch.zeros(side.batch, side.tokens, dtype=torch.bool) if side.protected is None else side.protected
    return active.tolist(), ((~protected).sum(-1) * active).tolist()
