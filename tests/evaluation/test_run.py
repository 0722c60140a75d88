"""The evaluation: every condition draws, runs resume and share work, and what the report says is what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

pytest.importorskip("diffusers")
pytest.importorskip("textblob")
pytest.importorskip("kornia")

from sdattn_fast import Program, SalienceDropout
from sdattn_fast.evaluation.conditions import CONTROL, NOT_TECHNIQUES, STOCK, Condition, ConditionInputs, conditions
from sdattn_fast.evaluation.cost import costs
from sdattn_fast.evaluation.peers import AttendAndExcite, InitialNoise, SynGen, peers
from sdattn_fast.evaluation.report import verdict, write_report
from sdattn_fast.evaluation.run import Evaluation, draw_batch, inputs_for
from sdattn_fast.evaluation.search import alternative_kinds
from sdattn_fast.evaluation.sketches import RandomMasks
from sdattn_fast.evaluation.subjects import Prompts, ShapesWorld
from sdattn_fast.files import ProgramFile
from sdattn_fast.guidance.clip_score import ClipScorer
from sdattn_fast.lab import load_pipeline, shapes_path

HEADS = {"up_blocks.2.attentions.0.transformer_blocks.0.attn2": (0,)}
NAMES = [c.name for c in conditions()]


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = load_pipeline()
    made.set_progress_bar_config(disable=True)
    made.unet.requires_grad_(False)
    made.vae.requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer.load(shapes_path() / "clip")


@pytest.fixture(scope="module")
def world(scorer: ClipScorer) -> ShapesWorld:
    made = ShapesWorld(5, scorer)
    made.steps = 4
    return made


@pytest.fixture(scope="module")
def inputs(scorer: ClipScorer) -> ConditionInputs:
    tuned = ProgramFile(Program(SalienceDropout(0.1)), guidance_scale=3.0, num_inference_steps=3)
    return ConditionInputs((), (), (), (), 4, scorer=scorer, threshold=0.3, heads=HEADS, tuned=tuned)


def _named(*names: str) -> list[Condition]:
    return [c for c in conditions() if c.name in names]


def test_conditions_are_named_once_and_cover_the_nine() -> None:
    assert len(set(NAMES)) == len(NAMES) and NAMES[0] == STOCK
    techniques = {c.technique for c in conditions()} - NOT_TECHNIQUES
    assert techniques == {
        "semantic gate", "phrase fusion", "head selection", "salience dropout", "NMS with smoothing", "GradCAM",
        "structure refinement", "selective maps", "CLIP-rewarded tuning",
    }  # fmt: skip
    assert [c.peer for c in conditions() if c.technique == "peer"] == peers()


@pytest.fixture(scope="module")
def stock_picture(pipe: Any, world: ShapesWorld, inputs: ConditionInputs) -> np.ndarray:
    (stock,) = _named(STOCK)
    return draw_batch(pipe, stock, inputs_for(world, range(2), pipe, inputs), world, range(2))[0][0]


OURS = [c for c in conditions() if c.peer is None]


@pytest.mark.parametrize("condition", OURS, ids=lambda c: c.name)
def test_every_condition_draws_and_leaves_no_trace(
    condition: Condition, pipe: Any, world: ShapesWorld, inputs: ConditionInputs, stock_picture: np.ndarray
) -> None:
    # A threshold that nothing passes: a gate has something to do.
    batch_inputs = replace(inputs_for(world, range(2), pipe, inputs), threshold=2.0)
    before = dict(pipe.unet.attn_processors)
    pictures, maps = draw_batch(pipe, condition, batch_inputs, world, range(2))
    assert [p.shape for p in pictures] == [(64, 64, 3)] * 2 and all(p.dtype == np.uint8 for p in pictures)
    if condition.sketch is None:
        assert [len(m) for m in maps] == [len(of_prompt) for of_prompt in batch_inputs.objects]
        assert all(heat.shape == (64, 64) and np.isfinite(heat).all() for of_prompt in maps for heat in of_prompt)
    else:
        assert maps == [None, None]
    if condition.name in (STOCK, "maps"):
        assert (pictures[0] == stock_picture).all()
    else:
        assert (pictures[0] != stock_picture).any()
    after = dict(pipe.unet.attn_processors)
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_the_control_of_tuning_has_its_options_and_not_its_program(
    pipe: Any, world: ShapesWorld, inputs: ConditionInputs
) -> None:
    (control,) = [c for c in conditions() if c.technique == CONTROL]
    batch_inputs = inputs_for(world, range(1), pipe, inputs)
    (picture,), _ = draw_batch(pipe, control, batch_inputs, world, range(1))
    assert inputs.tuned is not None and inputs.tuned.guidance_scale == 3.0
    tuned = replace(inputs.tuned, program=Program())
    (tuned_condition,) = _named("tuned")
    (without,), _ = draw_batch(pipe, tuned_condition, replace(batch_inputs, tuned=tuned), world, range(1))
    (other,), _ = draw_batch(pipe, tuned_condition, batch_inputs, world, range(1))
    assert (picture == without).all() and (picture != other).any()


def test_a_peer_draws_in_place_of_the_pipeline(
    pipe: Any, world: ShapesWorld, inputs: ConditionInputs, stock_picture: np.ndarray
) -> None:
    batch_inputs = inputs_for(world, range(2), pipe, inputs)
    for peer, same in ((SynGen(), False), (SynGen(scale=0.0), True), (InitialNoise(noises=1), True)):
        pictures, maps = draw_batch(pipe, Condition("a peer", "peer", peer=peer), batch_inputs, world, range(2))
        assert [p.shape for p in pictures] == [(64, 64, 3)] * 2 and maps == [None, None]
        # A batch of one rounds otherwise than stock's of two.
        assert (np.abs(pictures[0].astype(int) - stock_picture).max() <= 1) == same


def test_peers_that_cannot_draw_are_left_out(
    tmp_path: Path, pipe: Any, world: ShapesWorld, inputs: ConditionInputs
) -> None:
    chosen = [
        *_named(STOCK, "guidance rescale"),
        Condition("large", "peer", peer=AttendAndExcite(resolution=64)),
    ]
    unguided = ShapesWorld(2, world.scorer)
    unguided.guidance, unguided.steps = 1.0, 1
    evaluation = Evaluation(tmp_path, pipe, unguided, chosen, inputs, "shapes", batch=2)
    assert evaluation.left_out == {
        "guidance rescale": "there is no unconditional half at guidance 1.0",
        "large": "no cross-attention at 64x64; there is 16x16, 8x8, 4x4",
    }
    evaluation.run()
    content = write_report(evaluation, {}, "a machine")
    assert content["left out"] == evaluation.left_out and list(content["measures"]) == [STOCK]
    line = "large: not drawn, no cross-attention at 64x64; there is 16x16, 8x8, 4x4."
    markdown = (tmp_path / "evaluation.md").read_text()
    assert line in markdown and line in (tmp_path / "evaluation.html").read_text() and "one picture" not in markdown


def test_conditions_without_what_they_need_are_left_out(tmp_path: Path, pipe: Any, world: ShapesWorld) -> None:
    bare = Evaluation(tmp_path, pipe, world, conditions(), ConditionInputs((), (), (), (), 4), "shapes")
    assert bare.left_out["tuned"] == "no tuned" and bare.left_out["gate, hard"] == "no scorer, threshold"
    assert {c.name for c in bare.conditions} == set(NAMES) - set(bare.left_out)


def test_runs_resume_and_processes_share(
    tmp_path: Path, pipe: Any, world: ShapesWorld, inputs: ConditionInputs, monkeypatch: Any
) -> None:
    from sdattn_fast.evaluation import run as module

    drawn: list[tuple[str, int]] = []
    original = module.draw_batch

    def counted(pipe: Any, condition: Condition, *rest: Any) -> Any:
        drawn.append((condition.name, rest[2].start))
        return original(pipe, condition, *rest)

    monkeypatch.setattr(module, "draw_batch", counted)
    chosen = _named(STOCK, "dropout")

    def made(folder: str) -> Evaluation:
        return Evaluation(tmp_path / folder, pipe, world, chosen, inputs, "shapes", batch=2)

    whole = made("whole")
    whole.run()
    assert len(drawn) == 6 and not whole.missing()
    shared, other = made("shared"), made("shared")
    with pytest.raises(ValueError, match=r"6 batches of .* are not drawn"):
        shared.results()
    shared.run(0, 2)
    assert shared.missing() == 3
    other.run(1, 2)
    assert sorted(drawn[6:]) == sorted(drawn[:6])
    # NaN is no equal of itself.
    assert json.dumps(shared.results()) == json.dumps(whole.results())
    batch = next((tmp_path / "shared" / "batches").rglob("*.json"))
    batch.unlink()
    made("shared").run()
    assert len(drawn) == 13
    made("shared").run()
    assert len(drawn) == 13


def test_another_evaluation_is_refused(tmp_path: Path, pipe: Any, world: ShapesWorld, inputs: ConditionInputs) -> None:
    def made(chosen: list[Condition] | None = None, **arguments: Any) -> Evaluation:
        return Evaluation(
            tmp_path, pipe, world, chosen or _named(STOCK), **{"inputs": inputs, "model": "shapes", **arguments}
        )

    made()
    made(_named(STOCK, "dropout"))  # more conditions are the same evaluation
    made()
    with pytest.raises(ValueError, match="model: 'shapes', now 'other'"):
        made(model="other")
    with pytest.raises(ValueError, match="threshold"):
        made(inputs=replace(inputs, threshold=0.1))
    other = replace(_named("dropout")[0], program=Program())
    with pytest.raises(ValueError, match="dropout"):
        made([*_named(STOCK), other])
    made([*_named(STOCK, "SynGen")])
    searched = replace(_named("SynGen")[0], peer=SynGen(scale=8.0))
    with pytest.raises(ValueError, match="SynGen"):
        made([*_named(STOCK), searched])
    # A folder of before there were peers, biases and other scores says nothing of them.
    stored = json.loads((tmp_path / "settings.json").read_text())["conditions"]
    assert not {"peer", "bias", "score"} & set(stored[STOCK]) and stored["SynGen"]["peer"]["scale"] == 20.0
    of_other_scores = [c for kind in alternative_kinds() for c in kind.conditions][:1]
    made([*_named(STOCK), *of_other_scores])
    with pytest.raises(ValueError, match="recipe's score"):
        made([*_named(STOCK), replace(of_other_scores[0], score={"presence": 2.0})])
    with pytest.raises(ValueError, match=r"conditions: expected names that differ, got .*'stock', 'stock'"):
        made(_named(STOCK) * 2)


@pytest.mark.parametrize("text", ["", "[]", "[1, 2]", '[{"x": 1}]', "[" * 100_000])
def test_a_broken_batch_is_named(
    tmp_path: Path, pipe: Any, world: ShapesWorld, inputs: ConditionInputs, text: str
) -> None:
    """Before anything is drawn."""
    stock = [c for c in conditions() if c.name == STOCK]
    path = Evaluation(tmp_path, pipe, world, stock, inputs, "shapes")._path(stock[0], range(len(world.prompts)))
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path.name} is not as it was written; remove it"):
        Evaluation(tmp_path, pipe, world, stock, inputs, "shapes")
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json is not as it was written; name another folder"):
        Evaluation(tmp_path, pipe, world, stock, inputs, "shapes")


def test_a_full_disk_loses_nothing(
    tmp_path: Path, pipe: Any, world: ShapesWorld, inputs: ConditionInputs, monkeypatch: Any
) -> None:
    evaluation = Evaluation(tmp_path, pipe, world, _named(STOCK), inputs, "shapes", batch=3)
    write, written = Path.write_text, []

    def full(self: Path, text: str, *rest: Any) -> int:
        if written:
            write(self, text[: len(text) // 2])
            raise OSError(28, "No space left on device")
        written.append(self)
        return write(self, text, *rest)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        evaluation.run()
    monkeypatch.undo()
    assert evaluation.missing() == 1
    evaluation.run()
    assert len(evaluation.results()[STOCK]) == 5


def test_the_report(tmp_path: Path, pipe: Any, world: ShapesWorld, inputs: ConditionInputs) -> None:
    chosen = _named(STOCK, "dropout", "maps", "latent * (1 + sigmoid)", "guidance rescale")
    evaluation = Evaluation(tmp_path, pipe, world, chosen, inputs, "shapes", batch=5)
    evaluation.run()
    calls: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    cost = costs(pipe, world, chosen, inputs, count=2, rounds=1)
    handle.remove()
    assert set(calls) <= {1, 2}  # one picture a call, with its unconditional half
    assert all(x["ms a step"] > 0 and x["peak MiB"] > 0 for x in cost.values()) and cost[STOCK]["of stock"] == 1
    content = write_report(evaluation, cost, "a machine")
    assert json.loads((tmp_path / "summary.json").read_text()) == content
    results = evaluation.results()
    bound = [row["bound"] for row in results["dropout"]]
    assert content["measures"]["dropout"]["bound"]["mean"] == pytest.approx(np.mean(bound))
    markdown = (tmp_path / "evaluation.md").read_text()
    assert all(f"| {c.name} | {c.technique} |" in markdown for c in chosen)
    assert content["cost note"] in markdown and "one picture a call" in content["cost note"]
    page = (tmp_path / "evaluation.html").read_text()
    assert "latent * (1 + sigmoid)" in page and page.count("data:image/png;base64,") == 2 and "a machine" in page
    assert content["cost note"] in page


def test_stock_costs_what_the_pipeline_alone_costs(pipe: Any, world: ShapesWorld, inputs: ConditionInputs) -> None:
    before = dict(pipe.unet.attn_processors)
    seen: list[bool] = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: seen.append(pipe.unet.attn_processors == before))
    costs(pipe, world, _named(STOCK), inputs, count=1, rounds=1)
    handle.remove()
    assert seen and all(seen)


def test_verdicts() -> None:
    cell = {"mean": 0.5, "none": 0.4, "captions": 9, "difference": 0.1, "low": 0.05, "high": 0.2}
    assert verdict(cell) == "helps" and verdict({**cell, "low": -0.1}) == "no difference"
    assert verdict({**cell, "low": -0.3, "high": -0.1}) == "hurts"
    assert verdict({"mean": None, "none": None, "captions": 0}) == ""
    assert verdict({**cell, "difference": 0.0, "low": 0.0, "high": 0.0}) == "no difference"
    assert verdict({"mean": 0.4, "none": 0.4, "captions": 1}) == ""


def test_the_shapes_world_measures_true_scenes(scorer: ClipScorer) -> None:
    """Its own pictures are right in everything, and a blank one in nothing."""
    world = ShapesWorld(40, scorer)
    pictures = [scene.image for scene in world.scenes]
    maps = [[gaussian_filter(thing.mask.astype(np.float32), 1.0) for thing in s.objects] for s in world.scenes]
    rows = world.measure(range(40), pictures, maps)
    for scene, row in zip(world.scenes, rows, strict=True):
        assert row["bound"] == row["present"] == row["all right"] == row["pointing"] == 1 and row["map IoU"] > 0.8
        assert row["relation"] == 1 if scene.relation else np.isnan(row["relation"])
    assert any(scene.relation for scene in world.scenes)
    mirrored = world.measure(range(40), [p[::-1, ::-1].copy() for p in pictures], [None] * 40)
    for scene, row in zip(world.scenes, mirrored, strict=True):
        assert row["relation"] == 0 if scene.relation else np.isnan(row["relation"])
        assert np.isnan(row["pointing"]) and np.isnan(row["map IoU"])
    (blank,) = world.measure([0], [np.full((64, 64, 3), 255, np.uint8)], [None])
    assert blank["bound"] == blank["present"] == blank["all right"] == 0


def test_prompts_of_a_user(pipe: Any, scorer: ClipScorer) -> None:
    subject = Prompts(["a red circle and a blue square", "run quickly"], scorer, steps=2)
    everything, objects = subject.phrases(0, pipe.tokenizer)
    assert [p.text for p in everything] == ["a red circle", "a blue square"] == [p.text for p in objects]
    assert [p.text for p in subject.phrases(1, pipe.tokenizer)[1]] == ["run quickly"]
    blank = np.full((64, 64, 3), 255, np.uint8)
    rows = subject.measure([0, 1], [blank, blank], [None, None])
    texts = scorer.texts(["a red circle", "a blue square"]) @ scorer.pictures([blank])[0]
    assert rows[0]["CLIP of the weakest phrase"] == pytest.approx(float(texts.min()), abs=1e-6)
    assert set(rows[0]) == set(subject.measures)


def test_the_sketch_multiplies_logits(pipe: Any) -> None:
    """With no mask entry 0 it is stock; with all of them every token weighs the same."""
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        stock = pipe.unet(x, 5, encoder_hidden_states=text).sample
        with RandomMasks(pipe.unet, 0.0):
            torch.testing.assert_close(pipe.unet(x, 5, encoder_hidden_states=text).sample, stock, rtol=1e-4, atol=1e-4)
        with RandomMasks(pipe.unet, 1.0):
            flat = pipe.unet(x, 5, encoder_hidden_states=text).sample
            shuffled = pipe.unet(x, 5, encoder_hidden_states=text[:, torch.randperm(77)]).sample
    torch.testing.assert_close(flat, shuffled, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(flat, stock, atol=1e-3)
