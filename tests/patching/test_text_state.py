"""What a patch knows of a text and keeps of it: never another text's, another graph's or another mode's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from side_by_side import side_by_side
from torch import Tensor

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout

N, TEXT = 77, 32
DROPS = Program(SalienceDropout(0.3), Refinement(1, 0.1, 1.0), "content")
PROTECTED = torch.arange(N) > 20


def inputs(batch: int = 2) -> tuple[Tensor, int, Tensor]:
    return torch.randn(batch, 4, 16, 16), 500, torch.randn(batch, N, TEXT)


@pytest.fixture
def unet(parts: dict[str, Any]) -> Any:
    yield parts["sd15"]
    parts["sd15"].eval().requires_grad_(True)


@pytest.mark.parametrize("gate", ["none", "plain", "learnt", "learnt, given in inference mode"])
@pytest.mark.parametrize("program", [DROPS, Program(), Program(SalienceDropout(0.3, mode="random"))])
def test_inference_mode_and_then_a_training_step(program: Program, gate: str, unet: Any) -> None:
    given = None if gate == "none" else torch.rand(N)
    if gate.startswith("learnt"):
        given = torch.nn.Parameter(torch.rand(N))
    x = inputs()
    found = []
    for first in (True, False):
        with torch.inference_mode(gate.endswith("inference mode")):
            patch = sdattn_fast.apply(unet, program, gate=given, protected=PROTECTED, seed=1)
        with patch:
            if first:
                with torch.inference_mode():
                    unet(*x)
            unet.zero_grad()
            unet(*x).sample.sum().backward()
            found.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_graph_of_a_gate_is_not_kept(unet: Any) -> None:
    class Token:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.token = Token()
            alive.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    alive: list[Any] = []
    unet.requires_grad_(False)
    gate, x = torch.rand(N, requires_grad=True), inputs()
    with sdattn_fast.apply(unet, DROPS, protected=PROTECTED) as patch:
        for _ in range(3):
            patch.update(gate=Marked.apply(gate))
            unet(*x).sample.sum().backward()
        patch.update(gate=None)
        gc.collect()
        assert len(alive) == 3 and not any(token() for token in alive)
    assert gate.grad is not None and gate.grad.abs().max() > 0


def test_rows_of_a_text_that_was_written_over(build: Callable[[str], Any]) -> None:
    """Through numpy, which torch does not see: on a CPU the text is compared."""
    pipe = build("sd15")
    with torch.no_grad(), sdattn_fast.apply(pipe, DROPS, gate=torch.rand(N)):
        short, long = (pipe.encode_prompt(words, "cpu", 1, False)[0] for words in ("a", "many letters in a row"))
        x, t, _ = inputs(1)
        buffer = short.clone()
        first = pipe.unet(x, t, buffer).sample
        buffer.numpy()[:] = long.numpy()
        found = pipe.unet(x, t, buffer).sample
        assert torch.equal(found, pipe.unet(x, t, long).sample)
        assert not torch.allclose(found, first, atol=1e-3)


def test_texts_in_turn_by_several_threads(build: Callable[[str], Any]) -> None:
    pipe = build("sd15")
    with torch.no_grad(), sdattn_fast.apply(pipe, DROPS) as patch:
        texts = [pipe.encode_prompt(words, "cpu", 1, False)[0] for words in ("a", "b c", "d e f", "gg", "h" * 9)]
        right = [patch._memory.find(text).key for text in texts]
        assert len(set(right)) > 3

        def work(stride: int) -> None:
            for i in range(400):
                which = i * stride % len(texts)
                rows = patch._memory.find(texts[which])
                assert rows.key == right[which]
                patch._models[0].text.see(rows)

        side_by_side(work, (1, 2, 3, 4))


def test_an_update_keeps_keys_and_values_and_nothing_stale(build: Callable[[str], Any], draw: Any) -> None:
    """In the middle of a call, against a patch that had it from the start of the step."""
    pipe = build("sd15")
    gates = [None, torch.rand(N), torch.rand(1, N), torch.zeros(N)]
    found = []
    for text_cache in (True, False):
        with sdattn_fast.apply(pipe, DROPS, text_cache=text_cache) as patch:

            def change(pipe: Any, i: int, t: Any, inputs: dict[str, Any], patch: Any = patch) -> dict[str, Any]:
                patch.update(gate=gates[(i + 1) % 4])
                return inputs

            found.append(draw(pipe, num_inference_steps=5, callback_on_step_end=change))
    assert np.abs(found[0] - found[1]).max() < 1e-3


@pytest.mark.parametrize("steps, times", [(None, (900, 600, 300)), ((0, 2), (900, 300)), ((1,), (600,))])
def test_maps_of_pictures_drawn_in_train_mode(steps: Any, times: tuple[int, ...], unet: Any) -> None:
    """As in a validation between training steps: timesteps say the step, unless there are gradients."""
    unet.train()
    x, _, text = inputs()
    with torch.no_grad():
        singles = []
        for t in times:
            with sdattn_fast.apply(unet, DROPS, protected=PROTECTED, capture=Capture()) as patch:
                unet(x, t, text)
                singles.append(next(iter(patch.maps.values())))
        with sdattn_fast.apply(unet, DROPS, protected=PROTECTED, capture=Capture(steps=steps)) as patch:
            for t in (900, 600, 300):
                unet(x, t, text)
            mean = next(iter(patch.maps.values()))
    torch.testing.assert_close(mean, torch.stack(singles).mean(0))
