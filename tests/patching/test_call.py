"""Whose picture, which step, which rows: in every kind of call, copy, loop and thread. What is right is told by stock
pipelines, by single prompts, or by arithmetic."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from side_by_side import side_by_side

import sdattn_fast
from sdattn_fast import Capture, Program, SalienceDropout

DROPS = Program(dropout=SalienceDropout(0.3))
KEEP = Capture(layers="*")
WHEN = {0: 0.1, 2: 0.5}


def first_maps(patch: Any) -> torch.Tensor:
    return next(iter(patch.maps.values()))


def latents_of(pipe: Any, count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "prompts, negative",
    [(["a red car", ""], None), (["cat", "ugly"], "ugly"), (["cat", "cat"], "cat"), (["", ""], None)],
)
def test_a_picture_does_not_depend_on_its_neighbours_prompt(
    prompts: list[str], negative: str | None, build: Callable[[str], Any]
) -> None:
    pipe, noise = build("sd15"), latents_of(None, 2)
    how = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 5.0}
    gate = torch.ones(2, 77)
    gate[0, 1:4], gate[1, 1:3] = 0.0, 3.0

    def drawn(which: slice) -> tuple[np.ndarray, torch.Tensor]:
        asked = {"negative_prompt": None if negative is None else [negative] * len(prompts[which])}
        with sdattn_fast.apply(pipe, DROPS, capture=KEEP, gate=gate[which]) as patch:
            pictures = pipe(prompts[which], latents=noise[which], **asked, **how).images
            return pictures, first_maps(patch)

    together, maps = drawn(slice(0, 2))
    assert len(maps) == 2
    for i in range(2):
        alone, of_one = drawn(slice(i, i + 1))
        np.testing.assert_allclose(together[i : i + 1], alone, atol=2e-5)
        torch.testing.assert_close(maps[i : i + 1], of_one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("conditional_first", [True, False])
def test_a_loop_that_asks_twice(conditional_first: bool, build: Callable[[str], Any]) -> None:
    """Guidance in two forwards: maps of the conditional one, one step counted."""
    pipe, x = build("sd15"), latents_of(None)
    pipe.scheduler.set_timesteps(3)
    found = []
    for apart in (False, True):
        with (
            torch.no_grad(),
            sdattn_fast.apply(pipe, DROPS, capture=Capture(layers="*", steps=(0, 2)), dropout_when=WHEN) as patch,
        ):
            positive, negative = pipe.encode_prompt("a red car", "cpu", 1, True)
            noises = []
            for t in pipe.scheduler.timesteps:
                if apart:
                    texts = (positive, negative) if conditional_first else (negative, positive)
                    parts = [pipe.unet(x, t, text).sample for text in texts]
                    noises.append(torch.cat(parts[::-1] if conditional_first else parts))
                else:
                    noises.append(pipe.unet(torch.cat([x, x]), t, torch.cat([negative, positive])).sample)
            found.append((torch.stack(noises), first_maps(patch)))
    assert len(found[0][1]) == len(found[1][1]) == 1
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_a_loop_that_inverts_and_one_that_draws_after_it(build: Callable[[str], Any], parts: dict[str, Any]) -> None:
    """Rising timesteps are one run, and falling ones after them another."""
    from diffusers import DDIMInverseScheduler

    pipe, x = build("sd15"), latents_of(None)
    inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverse.set_timesteps(4)
    pipe.scheduler.set_timesteps(4)
    for times in (inverse.timesteps, pipe.scheduler.timesteps, inverse.timesteps):
        for patched in (pipe, pipe.unet):
            with torch.no_grad(), sdattn_fast.apply(patched, capture=KEEP) as patch:
                text = pipe.encode_prompt("a red car", "cpu", 1, False)[0]
                singles = []
                for t in times:
                    with patch.call():
                        pipe.unet(x, t, text)
                    singles.append(first_maps(patch))
                for again in range(2):
                    for t in times:
                        pipe.unet(x, t, text)
                    torch.testing.assert_close(first_maps(patch), torch.stack(singles).mean(0), msg=f"run {again}")


def test_one_step_runs_and_loops_that_set_their_timesteps(build: Callable[[str], Any]) -> None:
    pipe = build("sd15")
    with torch.no_grad(), sdattn_fast.apply(pipe, capture=KEEP) as patch:
        text = pipe.encode_prompt("a red car", "cpu", 1, False)[0]
        found = []
        for seed in (1, 2):
            pipe.scheduler.set_timesteps(1)
            for t in pipe.scheduler.timesteps:
                pipe.unet(latents_of(None, 1, seed), t, text)
            found.append(first_maps(patch))
        with patch.call():
            pipe.unet(latents_of(None, 1, 2), t, text)
        torch.testing.assert_close(found[1], first_maps(patch))
        assert not torch.allclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize(
    "scheduler", ["HeunDiscreteScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"]
)
def test_steps_are_the_callbacks(scheduler: str, build: Callable[[str], Any], draw: Any) -> None:
    """Schedules that name a timestep twice, with what each step's maps are by themselves."""
    import diffusers

    pipe = build("sd15")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    singles: list[torch.Tensor] = []
    with sdattn_fast.apply(pipe, capture=Capture(layers="*", steps="latest")) as patch:

        def keep(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            singles.append(first_maps(patch))
            return inputs

        draw(pipe, num_inference_steps=4, callback_on_step_end=keep)
    assert len(singles) >= 4
    for wanted in ((0, 2), (1,), tuple(range(len(singles)))):
        with sdattn_fast.apply(pipe, capture=Capture(layers="*", steps=wanted)) as patch:
            draw(pipe, num_inference_steps=4)
            torch.testing.assert_close(first_maps(patch), torch.stack([singles[i] for i in wanted]).mean(0))


def test_image_to_image_counts_its_own_steps(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("img2img")
    counted: list[int] = []
    with sdattn_fast.apply(pipe, capture=KEEP) as patch:

        def count(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            assert patch.current_call.steps.index == step
            counted.append(step)
            return inputs

        draw(pipe, num_inference_steps=6, strength=0.5, callback_on_step_end=count)
    assert counted == [0, 1, 2]


def test_embeddings_made_once_and_drawn_twice(build: Callable[[str], Any], draw: Any) -> None:
    pipe, found = build("sd15"), []
    with sdattn_fast.apply(pipe, capture=KEEP) as patch:
        positive, negative = pipe.encode_prompt("a red car", "cpu", 1, True)
        for seed in (1, 2, 1):
            draw(pipe, None, seed=seed, prompt_embeds=positive, negative_prompt_embeds=negative)
            found.append(first_maps(patch))
    torch.testing.assert_close(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_many_prompts_encoded_at_once_and_long_ago(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    words = [c * 2 for c in "abcdefghijklmnopqrst"]
    with sdattn_fast.apply(pipe, DROPS) as patch:
        positive, negative = pipe.encode_prompt(words, "cpu", 1, True, negative_prompt=[""] * 20)
        before = draw(pipe, "bb")
        for word in ("u", "v", "w") * 10:
            pipe.encode_prompt(word, "cpu", 1, True)
        gc.collect()
        got = draw(pipe, None, prompt_embeds=positive[1:2], negative_prompt_embeds=negative[1:2])
        np.testing.assert_allclose(got, before, atol=1e-5)
        # As a server does that keeps embeddings on disk, in half the size.
        half = positive[1:2].half()
        assert (
            patch._memory.find(half).prompt == [0] and patch._memory.find(positive[1:2].double()).protected is not None
        )


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_perturbed_attention_guidance(guidance_scale: float, build: Callable[[str], Any], draw: Any) -> None:
    """Maps of the prompts, not of the perturbed pass; a program that changes nothing changes nothing."""
    import diffusers

    sd = build("sd15")
    pipe = diffusers.StableDiffusionPAGPipeline(
        **sd.components, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    pipe.set_progress_bar_config(disable=True)
    how = {"guidance_scale": guidance_scale, "pag_scale": 2.0, "num_inference_steps": 1}
    stock = draw(pipe, ["a red car", ""], **how)
    with sdattn_fast.apply(pipe, capture=KEEP, gate=torch.ones(2, 77)) as patch:
        np.testing.assert_allclose(draw(pipe, ["a red car", ""], **how), stock, atol=2e-5)
        found = first_maps(patch)
    with sdattn_fast.apply(sd, capture=KEEP) as patch:
        draw(sd, ["a red car", ""], guidance_scale=guidance_scale, num_inference_steps=1)
        torch.testing.assert_close(found, first_maps(patch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_self_attention_guidance_looks_twice(guidance_scale: float, build: Callable[[str], Any], draw: Any) -> None:
    import diffusers

    sd = build("sd15")
    kind = getattr(diffusers, "StableDiffusionSAGPipeline", None)
    pipe = kind(**{k: v for k, v in sd.components.items() if k != "image_encoder"}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    steps: list[int] = []
    with sdattn_fast.apply(pipe, DROPS, capture=KEEP) as patch:
        draw(
            pipe, guidance_scale=guidance_scale, sag_scale=1.0, num_inference_steps=3, height=32, width=32,
            callback=lambda *_: steps.append(patch.current_call.steps.index), callback_steps=1,
        )  # fmt: skip
        assert len(first_maps(patch)) == 1
    assert steps == [0, 1, 2]


def test_a_batch_in_two_forwards_has_no_maps(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, capture=KEEP) as patch, torch.no_grad():
        with patch._calls.of_pipeline(pipe):
            text = pipe.encode_prompt(["a red car", "cat"], "cpu", 1, False)[0]
            pipe.unet(latents_of(None), 5, text[:1])
            with pytest.raises(ValueError, match=r"capture: StableDiffusionPipeline asked for prompts \[0\].*\[1\]"):
                pipe.unet(latents_of(None), 5, text[1:])


@pytest.mark.parametrize("threads", [2, 3])
def test_requests_in_threads(threads: int, build: Callable[[str], Any]) -> None:
    """A copy of the pipeline and a scheduler of its own for each request, as in diffusers' example of a server."""
    pipe = build("sd15")
    prompts = ["a red car", "cat", "dog in fog", "", "many words in a row", "b"] * 2
    how = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 5.0}

    def request(i: int, patch: Any) -> tuple[np.ndarray, torch.Tensor, list[int]]:
        mine = copy.copy(pipe)
        mine.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        mine.tokenizer = copy.deepcopy(pipe.tokenizer)  # transformers' are not safe for threads
        steps: list[int] = []

        def count(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            assert pipe is mine
            steps.append(patch.current_call.steps.index)
            return inputs

        pictures = mine(prompts[i], latents=latents_of(None, 1, i), callback_on_step_end=count, **how).images
        return pictures, first_maps(patch), steps

    with sdattn_fast.apply(pipe, DROPS, capture=KEEP, dropout_when={0: 0.1, 2: 0.4}) as patch:
        right = [request(i, patch) for i in range(len(prompts))]
        before = len(patch._models[0].states.all)
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(request, range(len(prompts)), [patch] * len(prompts)))
        assert before == 1 and len(patch._models[0].states.all) <= threads
    for (want, maps, steps), (got, of_thread, counted) in zip(right, found, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
        torch.testing.assert_close(of_thread, maps, atol=1e-5, rtol=1e-4)
        assert steps == counted == [0, 1, 2]


def test_maps_are_read_in_the_thread_that_drew(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, capture=KEEP) as patch:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(draw, pipe).result()
        assert len(first_maps(patch)) == 1, "one thread drew"
        together = threading.Barrier(2)

        def drawn() -> None:
            together.wait()
            mine = copy.copy(pipe)
            mine.tokenizer = copy.deepcopy(pipe.tokenizer)  # transformers' are not safe for threads
            draw(mine)

        with ThreadPoolExecutor(2) as pool:
            for one in [pool.submit(drawn) for _ in range(2)]:
                one.result()
        with pytest.raises(ValueError, match=r"maps: [23] threads drew with this patch, and this one did not"):
            patch.maps  # noqa: B018


class _Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("error", [_Stop, RuntimeError])
def test_a_call_that_was_broken_off(error: type[BaseException], build: Callable[[str], Any], draw: Any) -> None:
    """In the middle of a forward; the next call is clean."""
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, DROPS, capture=KEEP, dropout_when={0: 0.1, 1: 0.5}) as patch:
        want = draw(pipe), first_maps(patch)
        turns = iter(range(10))

        def interrupt(*_: Any) -> None:
            if next(turns) == 1:
                raise error

        handle = pipe.unet.mid_block.register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            draw(pipe, "something else")
        handle.remove()
        np.testing.assert_array_equal(draw(pipe), want[0])
        torch.testing.assert_close(first_maps(patch), want[1])
        assert len(patch._models[0].states.all) == 1
        with ThreadPoolExecutor(1) as pool:
            np.testing.assert_allclose(pool.submit(draw, copy.copy(pipe)).result(), want[0], atol=1e-6)


def test_pipelines_on_one_unet(build: Callable[[str], Any], draw: Any) -> None:
    """Another class of pipeline is watched where asked, and refused with a word how where not."""
    pipe, other = build("sd15"), build("img2img")
    want = {}
    with sdattn_fast.apply(other, DROPS):
        want = draw(other, num_inference_steps=3, strength=0.7)
    with sdattn_fast.apply(pipe, DROPS) as patch:
        with pytest.raises(ValueError, match=r"encoder_hidden_states: .*patch\.watch\(that_pipeline\)"):
            draw(other)
        patch.watch(other)
        patch.watch(other)
        np.testing.assert_allclose(draw(other, num_inference_steps=3, strength=0.7), want, atol=1e-6)
        with pytest.raises(ValueError, match="pipe: expected a pipeline on the patched UNet, got a "):
            patch.watch(build("sd2"))
        with pytest.raises(TypeError, match="pipe: expected a pipeline with encode_prompt, got int"):
            patch.watch(3)
    assert type(pipe).__mro__[1].__name__ != "StableDiffusionPipeline"
    assert type(other).__mro__[1].__name__ != "StableDiffusionImg2ImgPipeline"
    with pytest.raises(ValueError, match="pipe: expected a patch in place"):
        patch.watch(other)


def test_a_patched_pipeline_is_of_its_class(build: Callable[[str], Any], draw: Any, tmp_path: Any) -> None:
    import diffusers

    pipe = build("sd15")
    stock = draw(pipe)
    with sdattn_fast.apply(pipe, DROPS):
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet
        pipe.save_pretrained(tmp_path / "saved")
        twin = copy.copy(pipe)
    assert type(pipe) is diffusers.StableDiffusionPipeline and "encode_prompt" not in vars(pipe)
    np.testing.assert_array_equal(draw(twin), stock)  # a copy made meanwhile runs as before
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(loaded), stock, atol=1e-6)


def test_a_class_whose_methods_were_replaced_after_an_earlier_patch(
    build: Callable[[str], Any], draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs what the class has now."""
    pipe = build("sd15")
    with sdattn_fast.apply(pipe):
        draw(pipe)
    kind = type(pipe)
    called = []
    for name in ("__call__", "encode_prompt"):

        def replaced(self: Any, *args: Any, name: str = name, method: Any = getattr(kind, name), **more: Any) -> Any:
            called.append(name)
            return method(self, *args, **more)

        monkeypatch.setattr(kind, name, replaced)
    with sdattn_fast.apply(pipe):
        draw(pipe)
    assert called == ["__call__", "encode_prompt"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("adapted", [False, True])
def test_copies_are_whole_and_not_patched(
    how: str, adapted: bool, build: Callable[[str], Any], ip_adapter: Any, tmp_path: Any
) -> None:
    """Of the UNet and of the pipeline, while patched; and they can be patched themselves."""
    pipe = build("sd15")
    pipe.register_modules(unet=copy.deepcopy(pipe.unet))
    inputs: dict[str, Any] = {
        "sample": latents_of(None, 2),
        "timestep": 5,
        "encoder_hidden_states": torch.randn(2, 77, 32),
    }
    if adapted:
        pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
        inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 16)]}

    def copied(x: Any) -> Any:
        if how == "deepcopy":
            return copy.deepcopy(x)
        if how == "pickle":
            return pickle.loads(pickle.dumps(x))
        torch.save(x, tmp_path / "whole.pt")
        return torch.load(tmp_path / "whole.pt", weights_only=False)

    with torch.no_grad():
        stock = pipe.unet(**inputs).sample
        with sdattn_fast.apply(pipe.unet, DROPS, capture=KEEP) as patch:
            patched = pipe.unet(**inputs).sample
            with pytest.warns(UserWarning, match="a patched model is copied .* the copy is not patched; apply to it"):
                twin = copied(pipe.unet)
        torch.testing.assert_close(twin(**inputs).sample, stock)
        assert not [n for n, p in twin.attn_processors.items() if "Semantic" in type(p).__name__]
        with sdattn_fast.apply(twin, DROPS):
            torch.testing.assert_close(twin(**inputs).sample, patched)
        torch.testing.assert_close(twin(**inputs).sample, stock)
        assert not patch.installed
    if how != "deepcopy" or adapted:
        return
    with sdattn_fast.apply(pipe, DROPS), pytest.warns(UserWarning, match="the copy is not patched"):
        own = copy.deepcopy(pipe)
    assert type(own).__mro__[1].__name__ == "DiffusionPipeline" or type(own) is type(build("sd15"))
    assert own.unet is not pipe.unet and own.text_encoder is not pipe.text_encoder
    heard: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: heard.append(1))
    own("a red car", num_inference_steps=1, output_type="latent")
    assert not heard, "the copy encodes with its own encoder"
    pipe.text_encoder._forward_pre_hooks.clear()


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_patched_pipeline_is_pickled_unpatched(
    how: str, build: Callable[[str], Any], draw: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build("sd15")
    for module in pipe.text_encoder.modules():
        # transformers leaves some there, which cannot be pickled, when an SDXL pipeline encoded.
        monkeypatch.setattr(module, "_forward_hooks", OrderedDict())
    stock = draw(pipe)
    with sdattn_fast.apply(pipe, DROPS), pytest.warns(UserWarning, match="the copy is not patched"):
        if how == "pickle":
            own = pickle.loads(pickle.dumps(pipe))
        else:
            torch.save(pipe, tmp_path / "whole.pt")
            own = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert type(own) is type(pipe)
    np.testing.assert_array_equal(draw(own), stock)


def test_forwards_in_train_mode_and_then_in_eval(build: Callable[[str], Any]) -> None:
    pipe = build("sd15")
    pipe.register_modules(unet=copy.deepcopy(pipe.unet))
    x = latents_of(None)
    with sdattn_fast.apply(pipe, DROPS, capture=KEEP, dropout_when=WHEN) as patch:
        text = pipe.encode_prompt("a red car", "cpu", 1, False)[0].detach()
        patch.step = 0
        for training in (False, True, False):
            pipe.unet.train(training)
            with torch.set_grad_enabled(training):
                pipe.unet(x, 5, text)
            assert patch.current_call.steps.index == 0
            if not training:
                pipe.unet(x, 4, text)
                assert patch.current_call.steps.index == 1


def test_a_pictures_maps_while_a_model_is_trained(build: Callable[[str], Any], draw: Any) -> None:
    """A pipeline that draws between training steps has the mean of its steps, as always."""
    pipe = build("sd15")
    pipe.register_modules(unet=copy.deepcopy(pipe.unet))
    with sdattn_fast.apply(pipe, DROPS, capture=KEEP) as patch:
        draw(pipe, num_inference_steps=3)
        want = first_maps(patch)
        pipe.unet.train()
        patch.step = 7
        draw(pipe, num_inference_steps=3)
        torch.testing.assert_close(first_maps(patch), want)


@pytest.mark.parametrize("guess_mode", [False, True])
def test_maps_of_the_unet_and_of_its_controlnet(guess_mode: bool, build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("controlnet")
    with sdattn_fast.apply(pipe, capture=KEEP) as patch:
        draw(pipe, guess_mode=guess_mode)
        assert list(patch.maps) == patch.layers and any(name.startswith("controlnet.") for name in patch.maps)
        assert {len(maps) for maps in patch.maps.values()} == {1}


def test_two_pictures_in_one_call(build: Callable[[str], Any], draw: Any) -> None:
    """What a callback left for the steps to come is the first one's."""
    pipe = build("sd15")

    def leave(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        patch.current_call.gate = torch.zeros(77)
        patch.current_call.biases[leave] = {name: torch.full((1, 1, 1, 77), -3.0) for name in patch.layers}
        return inputs

    with sdattn_fast.apply(pipe, DROPS) as patch:
        want = draw(pipe)
        with patch.call():
            gated = draw(pipe, callback_on_step_end=leave)
            assert np.abs(gated - want).max() > 1e-4
            np.testing.assert_array_equal(draw(pipe), want)


def test_a_loop_beside_another_threads_pipeline(build: Callable[[str], Any], draw: Any) -> None:
    """The loop's schedule is its own copy's; what the patched pipeline's scheduler does meanwhile is another's."""
    pipe = build("sd15")
    mine = copy.copy(pipe)
    mine.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with torch.no_grad(), sdattn_fast.apply(pipe, DROPS, capture=KEEP) as patch, ThreadPoolExecutor(1) as pool:
        pool.submit(draw, pipe).result()
        for explicit in (False, True):
            text = mine.encode_prompt("a red car", "cpu", 1, False)[0]
            mine.scheduler.set_timesteps(4)
            indices = []
            with patch.call() if explicit else nullcontext():
                for i, t in enumerate(mine.scheduler.timesteps):
                    if i == 2:
                        pool.submit(draw, pipe).result()
                    for _ in range(2):
                        mine.unet(latents_of(None), t, text)
                    indices.append(patch.current_call.steps.index)
            assert indices == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inversion_in_every_mode(mode: Any, parts: dict[str, Any]) -> None:
    with mode(), sdattn_fast.apply(parts["sd15"], capture=KEEP) as patch:
        indices = []
        for t in torch.tensor([1, 300, 600, 900]):
            parts["sd15"](latents_of(None), t, torch.ones(1, 77, 32))
            indices.append(patch.current_call.steps.index)
        assert indices == [0, 1, 2, 3]


def test_encoding_the_roles_swapped_between_steps(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")

    def encode(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe.encode_prompt("ugly", "cpu", 1, True, negative_prompt="a red car")
        return inputs

    with sdattn_fast.apply(pipe, DROPS) as patch:
        want = draw(pipe, negative_prompt="ugly", num_inference_steps=3)
        got = draw(pipe, negative_prompt="ugly", num_inference_steps=3, callback_on_step_end=encode)
        assert patch._models[0].text.rows.prompt == [-1, 0]
    np.testing.assert_array_equal(got, want)


def test_a_copy_with_a_unet_of_its_own(build: Callable[[str], Any], draw: Any) -> None:
    """Is another model: patched by itself; and what cannot be patched is left as it was."""
    pipe = build("sd15")
    stock = draw(pipe)
    with sdattn_fast.apply(pipe, DROPS):
        want = draw(pipe)
        twin = copy.copy(pipe)
        twin.unet = _plain_copy(pipe.unet)
        np.testing.assert_allclose(_quiet(draw, twin), stock, atol=1e-6)
        with sdattn_fast.apply(twin, DROPS):
            np.testing.assert_allclose(draw(twin), want, atol=1e-6)
            np.testing.assert_array_equal(draw(pipe), want)
        np.testing.assert_allclose(_quiet(draw, twin), stock, atol=1e-6)


def _plain_copy(unet: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(unet)


def _quiet(draw: Any, pipe: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return draw(pipe)


def test_encoding_in_threads(build: Callable[[str], Any]) -> None:
    """The shared text encoder's hooks come and go under other threads' forwards."""
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, DROPS):

        def work(i: int) -> None:
            mine = copy.copy(pipe)
            mine.tokenizer = copy.deepcopy(pipe.tokenizer)
            for _ in range(40):
                mine.encode_prompt("abc"[i], "cpu", 1, True)

        side_by_side(work, range(3))


@pytest.mark.parametrize("broken_off", [_Stop, SystemExit])
def test_a_graphs_forward_waits_for_nobody_who_is_gone(broken_off: type[BaseException], parts: dict[str, Any]) -> None:
    """Forwards of a compiled model take turns; one that Ctrl-C or the end of its thread broke off has had its."""
    unet = copy.deepcopy(parts["small"])
    compiled = torch.compile(unet, backend="eager")
    inputs = latents_of(None), 5, torch.randn(1, 77, 32)
    with torch.no_grad(), sdattn_fast.apply(compiled, DROPS, protected=torch.arange(77) > 9) as patch:
        want = compiled(*inputs).sample
        states = patch._models[0].states

        def stop(*_: Any) -> None:
            raise broken_off

        def broken() -> None:
            handle = compiled.register_forward_pre_hook(stop)
            try:
                compiled(*inputs)
            except _Stop:
                pass
            finally:
                handle.remove()

        if broken_off is _Stop:
            broken()  # in this thread, which lives on
        else:
            thread = threading.Thread(target=broken)
            thread.start()
            thread.join()
        assert states.base.owner is not None
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(torch.no_grad()(compiled), *inputs).result(timeout=60).sample
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_a_pipeline_that_does_not_say_what_it_encodes(parts: dict[str, Any]) -> None:
    class Own:
        def __init__(self) -> None:
            self.unet = parts["sd15"]

    with pytest.warns(UserWarning, match="a Own has no encode_prompt.*Pass active= and protected="):
        sdattn_fast.apply(Own(), DROPS).remove()
    own = {"active": torch.tensor([False, True]), "protected": torch.zeros(77, dtype=torch.bool)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sdattn_fast.apply(Own(), DROPS, **own).remove()
        sdattn_fast.apply(Own()).remove()


def test_a_unet_exchanged_after_apply(build: Callable[[str], Any], draw: Any, parts: dict[str, Any]) -> None:
    pipe = build("sd15")
    stock_parts = pipe.unet
    with sdattn_fast.apply(pipe, DROPS):
        pipe.unet = copy.deepcopy(parts["sd2"])
        with pytest.warns(UserWarning, match="the unet of this StableDiffusionPipeline was exchanged after apply"):
            draw(pipe)
    pipe.unet = stock_parts
