"""The gate that CLIP sets: which phrases, what value, when, and that it leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("textblob")

import sdattn_fast
from sdattn_fast.guidance.clip_gate import ClipGate, calibrated_threshold
from sdattn_fast.guidance.clip_score import ClipScorer
from sdattn_fast.guidance.preview import LinearDecoder, Preview
from sdattn_fast.lab import shapes_path
from sdattn_fast.lab.shapes.world import sample_scene

PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer.load(shapes_path() / "clip")


@pytest.fixture
def patch(pipe: Any) -> Iterator[Any]:
    with sdattn_fast.apply(pipe) as made:
        yield made


def _draw(pipe: Any, prompt: Any = PROMPT, steps: int = 6, **how: Any) -> np.ndarray:
    make = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=steps, guidance_scale=4.0, generator=make, output_type="np", **how).images


@pytest.mark.parametrize("how, expected", [("hard", (0.0, 1.0)), ("amplify", (3.0, 1.0))])
def test_what_is_under_the_threshold_is_gated(how: str, expected: Any, pipe: Any, patch: Any, scorer: Any) -> None:
    gates = []

    def look(pipe: Any, step: int, t: Any, kept: Any) -> Any:
        kept = gate(pipe, step, t, kept)
        gates.append(patch.current_call.gate)
        return kept

    with ClipGate(patch, PROMPT, scorer, how=how, strength=3.0, steps=(1, 4), every=2) as gate:
        gate._score = lambda pipe: [torch.tensor([-0.1, 0.1])]  # type: ignore[method-assign]
        _draw(pipe, callback_on_step_end=look)
    assert [g is not None for g in gates] == [False, True, True, True, True, True]
    assert patch.current_call.gate is None and patch.gate is None
    tokens = [p.tokens("adjective-noun") for p in gate.phrases[0]]
    assert tokens == [(2, 3), (6, 7)]
    for which, value in zip(tokens, expected, strict=True):
        assert gates[1][0, list(which)].tolist() == [value] * 2
    others = [i for i in range(77) if i not in tokens[0] + tokens[1]]
    assert (gates[1][0, others] == 1).all()


def test_the_gate_is_that_of_apply(pipe: Any, scorer: Any) -> None:
    """What it draws is what a gate that is known beforehand draws."""
    ids = torch.ones(77)
    ids[[2, 3]] = 0
    with sdattn_fast.apply(pipe, gate=ids) as patch:
        expected = _draw(pipe)
    with sdattn_fast.apply(pipe) as patch:
        stock = _draw(pipe)
        with ClipGate(patch, PROMPT, scorer, how="hard", steps=(0, 5), every=1) as gate:
            gate._score = lambda pipe: [torch.tensor([-0.1, 0.1])]  # type: ignore[method-assign]
            patch.update(gate=ids)  # from the first step on
            got = _draw(pipe, callback_on_step_end=gate)
        assert torch.equal(patch.gate, ids), "the patch's own gate stays"
        patch.update(gate=None)
        assert (_draw(pipe) == stock).all()
    assert not np.allclose(got, stock, atol=1e-3)
    assert np.abs(got - expected).mean() < np.abs(stock - expected).mean() / 3


def test_soft(patch: Any, scorer: Any) -> None:
    with ClipGate(patch, PROMPT, scorer, how="soft", threshold=0.2, temperature=0.1) as gate:
        values = gate._gate([torch.tensor([0.2, 0.3])])[0]
    assert float(values[2]) == pytest.approx(0.5) and float(values[6]) == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize("linear", [False, True])
def test_scores_are_clips_of_the_preview(linear: bool, pipe: Any, patch: Any, scorer: Any) -> None:
    scenes = [sample_scene(i) for i in range(40)]
    pictures = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) / 127.5 - 1 for s in scenes])
    decoder = LinearDecoder.fit(pipe.vae, pictures) if linear else None
    prompts = ["a red circle", "a blue square and a green star", "run quickly"]
    distractors = ["a yellow triangle", "a cyan star"]
    with ClipGate(
        patch, prompts, scorer, how="amplify", distractors=distractors, steps=(4, 5), decoder=decoder
    ) as gate:
        seen = {}

        def look(pipe: Any, step: int, t: Any, kept: Any) -> Any:
            kept = gate(pipe, step, t, kept)
            if step == 4:
                seen["picture"] = gate._preview.decoded(pipe)
            return kept

        _draw(pipe, prompts, num_images_per_prompt=2, callback_on_step_end=look)
    ((step, scores),) = gate.scores
    assert step == 4 and [len(s) for s in scores] == [1, 1, 2, 2, 0, 0]
    if not linear:
        uint8 = ((seen["picture"].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
        embedded = scorer.pictures(list(uint8))
        rivals = (embedded @ scorer.texts(distractors).T).amax(1)
        want = embedded[2] @ scorer.texts(["a blue square", "a green star"]).T - rivals[2]
        torch.testing.assert_close(scores[2], want)


def test_the_preview_of_a_true_picture(pipe: Any) -> None:
    """A linear decoder is coarse, and has the colours right."""
    scenes = [sample_scene(i) for i in range(60)]
    pictures = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) / 127.5 - 1 for s in scenes])
    decoder = LinearDecoder.fit(pipe.vae, pictures[:40])
    with torch.no_grad():
        latents = pipe.vae.encode(pictures[40:]).latent_dist.mode() * pipe.vae.config.scaling_factor
        small = torch.nn.functional.interpolate(
            pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, size=latents.shape[2:], mode="area"
        )
    got = decoder(latents)
    assert got.shape == small.shape
    explained = 1 - (got - small).square().mean() / small.var()
    assert explained > 0.5, explained
    with pytest.raises(ValueError, match="at least 5 latent pixels"):
        LinearDecoder.fit(pipe.vae, pictures[:1, :, :8, :8])
    with pytest.raises(ValueError, match=r"\(n, 3, height, width\)"):
        LinearDecoder.fit(pipe.vae, pictures[0])
    with sdattn_fast.apply(pipe) as patch, pytest.raises(ValueError, match="has not run"):
        Preview(patch).latent(pipe)


def test_calibration_is_the_best_threshold() -> None:
    there, missing = [0.3, 0.5, 0.6, 0.2], [0.1, 0.25, 0.0]
    best = calibrated_threshold(there, missing)
    balanced = lambda cut: np.mean([x >= cut for x in there]) + np.mean([x < cut for x in missing])  # noqa: E731
    assert all(balanced(best) >= balanced(cut) for cut in np.linspace(-0.1, 0.7, 801))
    assert calibrated_threshold([1.0], [0.0]) == 0.5
    # Every phrase against every picture of an evaluation: memory must not grow with the square of that.
    many = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert calibrated_threshold(many + 1.0, many) == pytest.approx(1.0, abs=1e-4)
    for bad in ([], [float("nan")]):
        with pytest.raises(ValueError, match="present: expected at least one finite score"):
            calibrated_threshold(bad, [0.1])


@pytest.mark.parametrize(
    "how, error, words",
    [
        ({"how": "harder"}, ValueError, "'harder'"),
        ({"threshold": "low"}, TypeError, "threshold"),
        ({"threshold": float("nan")}, ValueError, "threshold"),
        ({"strength": 10**400}, ValueError, "strength"),
        ({"strength": 1.0}, ValueError, "strength"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"steps": (3, 3)}, ValueError, "steps"),
        ({"every": 0}, ValueError, "every"),
        ({"distractors": "a cat"}, TypeError, "distractors"),
        ({"distractors": [1]}, TypeError, "distractors"),
        ({"decoder": "linear"}, TypeError, "decoder"),
        ({"phrases": ["a green car"]}, ValueError, "'a green car'"),
        ({"fuse": "verb"}, ValueError, "verb"),
    ],
)  # fmt: skip
def test_bad_input(how: Any, error: type[Exception], words: str, patch: Any, scorer: Any) -> None:
    with pytest.raises(error, match=words):
        ClipGate(patch, PROMPT, scorer, **how)


def test_what_it_works_on(pipe: Any, patch: Any, scorer: Any) -> None:
    with pytest.raises(TypeError, match="ClipScorer"):
        ClipGate(patch, PROMPT, scorer.model)
    with pytest.raises(TypeError, match="patch: expected"):
        ClipGate(pipe, PROMPT, scorer)
    with pytest.raises(ValueError, match="for each of 2 prompts"):
        ClipGate(patch, [PROMPT] * 2, scorer, phrases=[["a red circle"]])
    patch.remove()
    with sdattn_fast.apply(pipe, gate=torch.ones(77)) as gated, pytest.raises(ValueError, match="without a gate"):
        ClipGate(gated, PROMPT, scorer)
