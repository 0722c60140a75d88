"""When a patch's salience dropout applies: always, in train mode, by a schedule over steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.guidance.relevance import run
from sdattn_fast.patching.settings import Settings

DROPS = Program(SalienceDropout(0.3), Refinement(1, 0.3, 0.0), "content")
DROPS_NOT = Program(None, Refinement(1, 0.3, 0.0), "content")


@pytest.fixture
def unet(parts: dict[str, Any]) -> Iterator[Any]:
    yield parts["small"]
    parts["small"].eval()


def _noise(unet: Any, t: float | Tensor = 500.0, **how: Any) -> Tensor:
    make = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=make), torch.randn(2, 9, 32, generator=make)
    return unet(x, torch.as_tensor(t), encoder_hidden_states=text).sample.detach()


@contextmanager
def _patched(unet: Any, program: Program, **how: Any) -> Iterator[Any]:
    with sdattn_fast.apply(unet, program, **how) as patch:
        yield patch


def test_in_training_alone(unet: Any) -> None:
    with _patched(unet, DROPS):
        drops = _noise(unet)
    with _patched(unet, DROPS_NOT):
        drops_not = _noise(unet)
    assert not torch.equal(drops, drops_not)
    with _patched(unet, DROPS, dropout_when="training"):
        for _ in range(2):  # there and back: what was prepared for one is not taken for the other
            assert torch.equal(_noise(unet.eval()), drops_not)
            torch.testing.assert_close(_noise(unet.train()), drops)


def test_by_hand_in_training_alone(unet: Any) -> None:
    originals = dict(unet.attn_processors)
    try:
        found = {}
        for name, how in {"drops": {}, "when": {"dropout_when": "training"}}.items():
            unet.set_attn_processor(sdattn_fast.SemanticAttnProcessor(DROPS, **how))
            found[name] = (_noise(unet.eval()), _noise(unet.train()))
        torch.testing.assert_close(found["when"][1], found["drops"][1])
        assert not torch.equal(found["when"][0], found["drops"][0])
    finally:
        unet.set_attn_processor(originals)


@pytest.mark.parametrize("capture", [None, Capture(layers="*")])
def test_a_schedule_over_denoising_steps(unet: Any, capture: Capture | None) -> None:
    ratios = (0.0, 0.25, 0.5, 0.5)
    expected = []
    for ratio in ratios:
        program = DROPS_NOT if ratio == 0 else Program(SalienceDropout(ratio), DROPS.refine, "content")
        with _patched(unet, program):
            expected.append(_noise(unet))
    with _patched(unet, DROPS, dropout_when={0: 0.0, 2: 0.5}, capture=capture) as patch:
        for run_number in range(2):
            # The timestep changes the UNet, so the same one every time, in four places of a schedule: four steps.
            for i, (t, want) in enumerate(zip(torch.full((4,), 500.0), expected, strict=True)):
                if i == 0 and run_number:
                    _noise(unet, 1.0)  # lower, so that 500 begins a run
                torch.testing.assert_close(_noise(unet, t), want)
                torch.testing.assert_close(_noise(unet, t), want, msg="a step's second forward counts as no step")
                if capture is not None and i == 1:
                    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 9, 32)
                    run(patch, x, torch.tensor(900.0), text)  # beside the run: counts as no step


def test_a_forward_is_one_step_in_whatever_the_model_is_wrapped(unet: Any) -> None:
    peft = pytest.importorskip("peft")
    own = copy.deepcopy(unet)
    with _patched(own, DROPS, dropout_when={0: 0.1, 3: 0.9}):
        expected = [_noise(own, t) for t in (900.0, 500.0, 100.0)]
    wrapped = peft.get_peft_model(copy.deepcopy(unet), peft.LoraConfig(r=2, target_modules=["to_k"]))
    for model in (wrapped, torch.compile(wrapped, backend="eager")):
        torch._dynamo.reset()
        with torch.no_grad(), _patched(model, DROPS, dropout_when={0: 0.1, 3: 0.9}):
            for t, one in zip((900.0, 500.0, 100.0), expected, strict=True):
                torch.testing.assert_close(_noise(model, t), one, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_a_schedule_over_training_steps(unet: Any) -> None:
    with _patched(unet, DROPS):
        drops = _noise(unet.train())
    with _patched(unet, DROPS_NOT):
        drops_not = _noise(unet)
    with _patched(unet, DROPS, dropout_when={100: 0.0, 200: 0.3}) as patch:
        with pytest.raises(ValueError, match=r"patch\.step"):
            _noise(unet)
        for step, want in ((50, drops_not), (100, drops_not), (200, drops), (900, drops)):
            patch.step = step
            torch.testing.assert_close(_noise(unet), want)
        patch.step = 150
        assert not torch.equal(_noise(unet), drops)


def test_a_pipelines_steps_are_counted(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("small")
    with sdattn_fast.apply(pipe, DROPS_NOT):
        never = draw(pipe, num_inference_steps=3)
    with sdattn_fast.apply(pipe, DROPS):
        always = draw(pipe, num_inference_steps=3)
    for schedule, same in (({2: 0.0, 3: 1.0}, never), ({0: 0.3}, always), ({1: 0.0, 2: 0.3}, None)):
        with sdattn_fast.apply(pipe, DROPS, dropout_when=schedule):
            got = draw(pipe, num_inference_steps=3)
        if same is None:
            assert (got != never).any() and (got != always).any()
        else:
            assert (got == same).all()


@pytest.mark.parametrize(
    "when, error, words",
    [
        ("sometimes", ValueError, "'sometimes'"),
        (0.5, TypeError, "float"),
        ({}, ValueError, "at least one step"),
        ({-1: 0.2}, ValueError, "-1"),
        ({0.5: 0.2}, ValueError, r"0\.5"),
        ({0: 1.5}, ValueError, r"1\.5"),
        ({0: "much"}, TypeError, "much"),
    ],
)
def test_bad_input(when: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Settings(DROPS, dropout_when=when)


def test_no_dropout_no_when() -> None:
    with pytest.raises(ValueError, match="no dropout"):
        Settings(Program(), dropout_when="training")
    with pytest.raises(ValueError, match="does not know the step"):
        sdattn_fast.SemanticAttnProcessor(DROPS, dropout_when={0: 0.1})
