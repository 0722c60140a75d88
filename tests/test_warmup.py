# ruff: noqa: F811
"""`warm_up` around the compilation, which tests/kernels/test_launches.py watches: what it calls, and what it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_models import PICTURE, _one_thread, build, parts, tokenizer, tokenizer_2  # noqa: F401

import sdattn_fast
from sdattn_fast import KernelRefused
from sdattn_fast.backend.triton import compile_ahead
from sdattn_fast.backend.triton.compile_ahead import Planned, compiled


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There seems to be a GPU; nothing is on it."""
    monkeypatch.setattr(compile_ahead, "compiles", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, build: Any) -> list[dict[str, Any]]:
    """Of the tiny pipelines: what they were called with."""
    found: list[dict[str, Any]] = []
    check = StableDiffusionPipeline.check_inputs

    def seen(self: Any, prompt: Any, height: Any, width: Any, *rest: Any, **named: Any) -> None:
        found.append({"prompt": prompt, "height": height, "width": width})
        check(self, prompt, height, width, *rest, **named)

    monkeypatch.setattr(StableDiffusionPipeline, "check_inputs", seen)
    return found


def test_what_is_no_patched_pipeline(build: Any) -> None:
    pipe = build("small")
    with pytest.raises(ValueError, match=r"pipe: this StableDiffusionPipeline is not patched; call sdattn_fast.apply"):
        sdattn_fast.warm_up(pipe)
    with (
        sdattn_fast.apply(pipe.unet),
        pytest.raises(TypeError, match=r"pipe: .* got UNet2DConditionModel; a model"),
    ):
        sdattn_fast.warm_up(pipe.unet)


def test_without_a_gpu_nothing_is_called(build: Any, calls: list[Any]) -> None:
    pipe = build("small")
    with sdattn_fast.apply(pipe):
        assert sdattn_fast.warm_up(pipe) == 0
    assert calls == []


def test_defaults_and_what_is_passed(build: Any, calls: list[Any], gpu: None) -> None:
    pipe, seen = build("small"), []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tuple(values["latents"].shape)))
        return values

    with sdattn_fast.apply(pipe):
        assert sdattn_fast.warm_up(pipe, height=48, width=16, callback_on_step_end=look) == 0
        embeds, others = pipe.encode_prompt("a cat", "cpu", 1, True)
        sdattn_fast.warm_up(pipe, prompt_embeds=embeds, negative_prompt_embeds=others, num_inference_steps=1)
    assert calls == [
        {"prompt": "a red car and a blue bus", "height": 48, "width": 16},
        {"prompt": None, "height": PICTURE, "width": PICTURE},
    ]
    assert seen == [(step, (1, 4, 24, 8)) for step in range(4)]


def test_generators_and_progress_bars_are_put_back(build: Any, gpu: None) -> None:
    pipe = build("small")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    before = [torch.get_rng_state(), *(g.get_state() for g in generators)]
    with sdattn_fast.apply(pipe, sdattn_fast.Program(sdattn_fast.SalienceDropout(0.1, mode="random"))):
        for given in (None, generators[0], generators):
            pipe.set_progress_bar_config(leave=False)
            prompts = ["red", "blue"] if isinstance(given, list) else "red"
            sdattn_fast.warm_up(pipe, prompt=prompts, generator=given)
            assert pipe._progress_bar_config == {"leave": False}
        with pytest.raises(ZeroDivisionError):
            sdattn_fast.warm_up(pipe, generator=generators[0], callback_on_step_end=lambda *_: 1 // 0)
    after = [torch.get_rng_state(), *(g.get_state() for g in generators)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("how", ["torch.compile", "compile()", "a block"])
def test_a_compiled_model_is_called_once_and_all_is_launched(
    how: str, build: Any, calls: list[Any], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_ahead, "planned", None)
    pipe = build("small")
    compiled = torch.compile(pipe.unet, backend="eager") if how == "torch.compile" else pipe.unet
    try:
        if how == "a block":
            pipe.unet.mid_block.compile(backend="eager")
        elif how == "compile()":
            pipe.unet.compile(backend="eager")
        pipe.unet = compiled
        with sdattn_fast.apply(pipe):
            assert sdattn_fast.warm_up(pipe, num_inference_steps=1) == 0
    finally:
        for module in pipe.unet.modules():
            module._compiled_call_impl = None
    assert len(calls) == 1


def test_a_kernel_that_does_not_compile_is_left_to_its_launch() -> None:
    class Kernel:
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def warmup(self, *arguments: Any, **options: Any) -> None:
            assert (arguments, options) == ((1, 2), {"grid": (3,), "enable_fp_fusion": True, "num_warps": 4})
            if self.error is not None:
                raise self.error

    errors = [None, RuntimeError("PassManager::run failed"), None, KernelRefused("triton", "no")]
    launches = [Planned(i, Kernel(e), torch.device("cpu"), (3, (1, 2), {"num_warps": 4})) for i, e in enumerate(errors)]
    assert sorted(compiled(launches)) == [False, False, True, True]
