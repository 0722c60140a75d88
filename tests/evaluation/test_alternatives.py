"""What the recipes are compared with: the entropy of maps, a learned score, biases of the logits; and their study."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from invoked import invoked
from scipy import stats

import sdattn_fast
from sdattn_fast import Capture, Program
from sdattn_fast.evaluation.alternatives import AttentionBias, Concentration, LearnedPresence, PresenceNetwork
from sdattn_fast.evaluation.alternatives.learned_presence import object_features
from sdattn_fast.evaluation.objects_world import ObjectsWorld
from sdattn_fast.evaluation.search import alternative_kinds
from sdattn_fast.guidance import Seen
from sdattn_fast.guidance.relevance import run
from sdattn_fast.patching.maps import Maps
from sdattn_fast.studies import alternatives, presence_network

CAPTION = "a large red circle and a small blue square on a gray background"
PHRASES = [(4,), (8, 9)]


@pytest.fixture(scope="module")
def objects_pipe() -> Any:
    pytest.importorskip("sdattn_fast_lab")
    from sdattn_fast.lab import load_pipeline

    return load_pipeline(world="objects")


def seen_of(**layers: torch.Tensor) -> Seen:
    first = next(iter(layers.values()))
    return Seen(first, first, 0, Maps(layers, tuple(range(first.shape[1])), None))


def test_concentration_is_what_entropy_lacks() -> None:
    maps = torch.rand(3, 10, 5, 4)
    phrases = [PHRASES, PHRASES[:1], []]
    found = Concentration(phrases).by_picture(seen_of(one=maps))
    expected = [
        np.mean([1 - stats.entropy(x[list(tokens)].mean(0).flatten(), base=20) for tokens in some])
        for x, some in zip(maps.double().numpy(), phrases[:2], strict=False)
    ]
    np.testing.assert_allclose(found, [*expected, 1.0], atol=1e-6)


def test_concentration_ends_at_one_pixel() -> None:
    maps = torch.zeros(1, 9, 5, 4)
    maps[:, 3] = 0.25
    maps[:, 5, 2, 2] = 0.25
    score = Concentration([(3,)]).by_picture(seen_of(one=maps)), Concentration([(5,)]).by_picture(seen_of(one=maps))
    np.testing.assert_allclose(torch.cat(score), [0.0, 1.0], atol=1e-3)


def test_features_of_an_object_are_its_maps_and_the_rivals() -> None:
    fine, coarse = torch.rand(2, 10, 4, 4), torch.rand(2, 10, 2, 2)
    maps = seen_of(fine=fine, coarse=coarse).maps
    first, second = object_features(maps, [[(4,), (8, 9), (1,)], [(2,)]])
    assert first.shape == (3, 4, 4, 4) and second.shape == (1, 4, 4, 4)
    torch.testing.assert_close(first[1, 0], fine[0, 8:].mean(0))
    torch.testing.assert_close(first[1, 2], torch.maximum(fine[0, 4], fine[0, 1]))
    torch.testing.assert_close(second[0, 1, 1:3, 1:3].mean(), coarse[1, 2].mean())
    assert not second[0, 2:].any()
    assert [len(x) for x in object_features(maps, [[(4,)], []])] == [1, 0]


def test_maps_that_are_missing() -> None:
    for score in (Concentration([(10,)]), LearnedPresence([(10,)], PresenceNetwork(1))):
        with pytest.raises(ValueError, match=r"phrases: expected maps of tokens \(10,\), got those of \(0, 1, 2"):
            score.by_picture(seen_of(one=torch.rand(1, 10, 4, 4)))


def test_learned_presence_is_the_mean_log_probability() -> None:
    torch.manual_seed(0)
    network = PresenceNetwork(1)
    seen = seen_of(one=torch.rand(2, 10, 4, 4))
    found = LearnedPresence([PHRASES, []], network).by_picture(seen)
    logits = network(object_features(seen.maps, [PHRASES, []])[0])
    torch.testing.assert_close(found, torch.stack([torch.sigmoid(logits).log().mean(), torch.zeros(())]))


@pytest.mark.parametrize("of", [Concentration, lambda phrases: LearnedPresence(phrases, PresenceNetwork(3))])
def test_a_step_along_the_gradient_raises_them_as_it_says(pipe: Any, of: Any) -> None:
    torch.manual_seed(0)
    score, latents = of(PHRASES), torch.randn(1, 4, 16, 16)
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        text, _ = pipe.encode_prompt([CAPTION], "cpu", 1, False)
        x = latents.clone().requires_grad_()
        value = score(run(patch, x, torch.tensor(500), text, maps_alone=True))
        (gradient,) = torch.autograd.grad(value, x)
        step = 0.002 * gradient / gradient.square().mean().sqrt()
        ahead, behind = (score(run(patch, latents + s, torch.tensor(500), text)) for s in (step, -step))
    assert behind < value < ahead
    assert float(ahead - behind) == pytest.approx(2 * float((gradient * step).sum()), rel=0.05)


@pytest.mark.parametrize(("how", "captions"), [("weak", 1), ("parted", 2)])
def test_a_bias_is_of_the_last_steps_maps(pipe: Any, how: str, captions: int) -> None:
    """And of the objects' tokens alone, in the steps asked, of each picture by itself; then it is gone."""
    biases, maps = [], []
    with sdattn_fast.apply(pipe, capture=Capture(steps="latest")) as patch:
        with AttentionBias(patch, [PHRASES] * captions, how=how, strength=2.0, steps=(1, 3)) as bias:

            def watched(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
                bias(pipe, step, t, kept)
                maps.append(patch.maps.upsample())
                biases.append(dict(patch.current_call.bias))
                return kept

            pipe(
                [CAPTION] * captions, num_inference_steps=5, output_type="latent", callback_on_step_end=watched,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        assert not patch.current_call.bias
    assert [bool(found) for found in biases] == [False, True, True, False, False]
    fine = [name for name, x in biases[1].items() if x.shape[2] == 256]
    assert fine
    for i, x in enumerate(maps[1].double().numpy()):
        own = np.stack([x[list(tokens)].mean(0) for tokens in PHRASES])
        greatest = own.max((1, 2), keepdims=True)
        if how == "weak":
            expected = np.broadcast_to(2 * np.log(greatest.max() / greatest), own.shape)
        else:
            shares = np.maximum(own / greatest, 0.05)
            expected = 2 * np.log(shares / shares.max(0))
        for name in fine:
            found = biases[1][name][i, 0].T.reshape(77, 16, 16)
            for tokens, change in zip(PHRASES, expected, strict=True):
                for token in tokens:
                    np.testing.assert_allclose(found[token], change, atol=1e-4)
            assert not found[[token for token in range(77) if token not in (4, 8, 9)]].any()


def test_a_bias_raises_what_is_weak(pipe: Any) -> None:
    def ratio(strength: float) -> float:
        with sdattn_fast.apply(pipe, capture=Capture(steps="latest")) as patch:
            with AttentionBias(patch, [PHRASES], how="weak", strength=strength, steps=(0, 1)) as bias:
                pipe(
                    CAPTION, num_inference_steps=2, output_type="latent", callback_on_step_end=bias,
                    generator=torch.Generator().manual_seed(0),
                )  # fmt: skip
            maps = patch.maps.upsample()[0]
        greatest = [float(maps[list(tokens)].mean(0).max()) for tokens in PHRASES]
        return max(greatest) / min(greatest)

    assert ratio(1.0) < ratio(0.0)


def test_what_a_bias_refuses(pipe: Any) -> None:
    with sdattn_fast.apply(pipe, capture=Capture(steps="latest")) as patch:
        with pytest.raises(ValueError, match="how: expected 'weak' or 'parted', got 'strong'"):
            AttentionBias(patch, [PHRASES], how="strong", strength=1.0, steps=(0, 1))
        bias = AttentionBias(patch, [PHRASES] * 2, how="weak", strength=1.0, steps=(0, 1))
        with pytest.raises(ValueError, match="phrases: expected those of each of 1 pictures, got 2"):
            pipe(CAPTION, num_inference_steps=2, callback_on_step_end=bias)


def test_what_is_in_order() -> None:
    """Against all pairs."""
    generator = np.random.default_rng(0)
    scores, truth = generator.standard_normal(50), generator.random(50) < 0.3
    expected = (scores[truth][:, None] > scores[~truth]).mean()
    found = presence_network._ordered(torch.from_numpy(scores), torch.from_numpy(truth))
    assert math.isclose(found, expected)


def test_the_network_learns(objects_pipe: Any, tmp_path: Path) -> None:
    trained = presence_network.train_presence_network(objects_pipe, 128, tmp_path / "network.safetensors")
    assert 250 < trained.objects < 600 and 0.4 < trained.strongest < 1 and 0.5 < trained.accuracy < 1
    loaded = PresenceNetwork.load(tmp_path / "network.safetensors")
    features = torch.rand(2, 14, 16, 16)
    torch.testing.assert_close(loaded(features), trained.network(features))
    with pytest.raises(ValueError, match="scenes: expected at least 64, got 63"):
        presence_network.train_presence_network(objects_pipe, 63, tmp_path / "other.safetensors")


def test_what_is_compared() -> None:
    kinds = {kind.name: kind.conditions for kind in alternative_kinds()}
    every = [c for conditions in kinds.values() for c in conditions]
    assert len({c.name for c in every}) == len(every) and {c.technique for c in every} == {"alternative"}
    assert all((c.correct is None) != (c.bias is None) for c in every)
    assert {tuple(c.score) for c in kinds["concentration"]} == {
        ("concentration",), ("presence", "segregation", "concentration"),
    }  # fmt: skip
    assert all(c.needs == ("network",) for c in kinds["learned presence"])
    assert {c.correct["every"] for c in kinds["relevance, reused"] if c.correct} == {3}
    assert all(c.program == Program() for c in every)


def test_the_study(objects_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdattn_fast.studies import choosing

    monkeypatch.setattr(choosing, "load_pipeline", lambda **of_world: objects_pipe)
    monkeypatch.setattr(ObjectsWorld, "__init__", functools.partialmethod(ObjectsWorld.__init__, steps=4))
    monkeypatch.setattr(alternatives, "prices", lambda study, reported: {
        c.name: {"ms a step": 1.0, "of stock": 1.25, "peak MiB": 3.0} for c in reported.conditions
    })  # fmt: skip
    short = [replace(kind, conditions=kind.conditions[:1]) for kind in alternative_kinds()]
    monkeypatch.setattr(alternatives, "alternative_kinds", lambda: short)
    ran = invoked(alternatives._alternatives, tmp_path, *"--choose 1 --report 2 --scenes 64".split())
    assert ran.exit_code == 0
    figures = json.loads((tmp_path / "alternatives.json").read_text())
    assert set(figures) == {"chosen", "network", "search", "report", "compared", "costs"}
    assert set(figures["chosen"]) == {kind.name for kind in short} and len(figures["search"]) == 1 + len(short)
    chosen = {"stock", "recipe, objects", "recipe, fast"} | {kind.conditions[0].name for kind in short}
    assert set(figures["report"]) == set(figures["costs"]) == chosen
    assert 0 <= figures["network"]["in order"] <= 1 and figures["network"]["objects"] > 100
    bases = ["recipe, objects", "recipe, fast", short[0].conditions[0].name]
    assert list(figures["compared"]) == bases
    tables = (tmp_path / "alternatives.md").read_text().split("\n\n")
    assert [table.split(" | ")[0] for table in tables[1:]] == [f"| compared with {base}" for base in bases]
