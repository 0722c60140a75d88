"""Heads: scores against masks that are known, the choice and its file, and the shapes pipeline drawn and ranked."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sdattn_fast.evaluation.world_subjects import world_subject
from sdattn_fast.files import load_heads
from sdattn_fast.guidance.clip_score import ClipScorer
from sdattn_fast.lab.shapes.captions import objects_of, words_of_objects
from sdattn_fast.lab.shapes.judge import bound_objects
from sdattn_fast.lab.shapes.world import sample_scene
from sdattn_fast.tuning import (
    HeadRanking,
    Observation,
    clip_score,
    effective_attention,
    iou_score,
    observe,
    rank_heads,
)
from sdattn_fast.tuning.head_scores import masks_of

SIZE = 16
TRUE = np.zeros((2 * SIZE, 2 * SIZE), dtype=bool)
TRUE[8:16, 8:24] = True
HEADS = (("down", 0), ("down", 1), ("up", 0), ("up", 1))


def observation(*maps: torch.Tensor, prompt: int = 0) -> Observation:
    """One object; a map for each of the heads."""
    return Observation(prompt, Image.new("RGB", TRUE.shape), ("car",), HEADS, torch.stack(maps)[None].half())


def box(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    mask = torch.zeros(SIZE, SIZE)
    mask[top:bottom, left:right] = 1.0
    return mask


# Exactly the object; its left half; its mirror image below; everything but one pixel.
EXACT, HALF, OTHER = box(4, 8, 4, 12), box(4, 8, 4, 8), box(8, 12, 4, 12)
MOST = 1 - box(0, 1, 0, 1)


def truth(_):
    return [TRUE]


def test_iou_is_what_it_is_by_hand():
    rows = iou_score(truth)(observation(EXACT, HALF, OTHER, MOST), torch.stack([EXACT, HALF, OTHER, MOST])[None])
    # Bicubic to twice the side moves no edge of these boxes: halves of the range lie between the same pixels.
    scores = rows[0].tolist()
    assert scores[:3] == pytest.approx([1.0, 0.5, 0.0])
    assert scores[3] == pytest.approx(TRUE.sum() / (TRUE.size - 4), abs=0.01)
    none = iou_score(lambda _: [None])(observation(EXACT, HALF, OTHER, MOST), torch.zeros(1, 4, SIZE, SIZE))
    assert none.isnan().all()


def test_masks_are_cut_in_the_middle_whatever_the_scale():
    maps = torch.rand(3, 5, 6, 7)
    wanted = (maps.numpy() * 100 - 3) > (
        (maps.numpy() * 100 - 3).max((-1, -2), keepdims=True) + (maps.numpy() * 100 - 3).min((-1, -2), keepdims=True)
    ) / 2
    assert (masks_of(maps).numpy() == wanted).mean() > 0.999


def test_the_best_heads_and_their_number():
    # The halves of the object are each in a head; together they find all of it, and the rest spoils that.
    right = EXACT - HALF
    seen = [observation(HALF, right, OTHER, box(0, 4, 0, 16), prompt=i) for i in range(3)]
    ranking = rank_heads(seen, iou_score(truth), "mask IoU")
    assert ranking.order == [("down", 0), ("down", 1), ("up", 0), ("up", 1)] and ranking.objects == 3
    assert ranking.count == 2 and ranking.curve[2] == pytest.approx(1.0) and ranking.curve[1] == pytest.approx(0.5)
    assert ranking.best() == {"down": [0, 1], "up": []}
    assert ranking.best(3) == {"down": [0, 1], "up": [0]}
    scores = effective_attention(seen, ranking.best(), iou_score(truth))
    assert scores["chosen"].tolist() == pytest.approx([1.0] * 3)
    # All heads' mean map is level where any of them looks: the object is 32 of those 128 pixels.
    assert scores["all"].tolist() == pytest.approx([32 / 128] * 3, abs=0.02)
    gain = float(scores["chosen"].mean() / scores["all"].mean() - 1)
    assert gain == pytest.approx(3.0, abs=0.3)


def test_objects_that_were_not_drawn_count_for_nothing():
    seen = [observation(EXACT, HALF, OTHER, MOST), observation(OTHER, OTHER, EXACT, OTHER, prompt=1)]
    ranking = rank_heads(seen, iou_score(lambda seen: [TRUE if seen.prompt == 0 else None]), "mask IoU")
    assert ranking.objects == 1 and ranking.scores[("down", 0)] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no object was found in any picture"):
        rank_heads(seen, iou_score(lambda _: [None]), "mask IoU")


def test_a_ranking_is_a_file_for_apply_and_a_picture(tmp_path):
    ranking = HeadRanking(
        {("down", 0): 0.2, ("down", 1): math.nan, ("up", 0): 0.5, ("up", 1): 0.2}, "mask IoU", 7, {1: 0.5, 4: 0.3},
        {"model": "x"},
    )  # fmt: skip
    ranking.save(tmp_path / "heads.json", 2)
    assert load_heads(tmp_path / "heads.json")[0] == {"down": (0,), "up": (0,)}
    loaded = HeadRanking.load(tmp_path / "heads.json")
    assert str(loaded) == str(ranking) and loaded.order[0] == ("up", 0) and loaded.order[-1] == ("down", 1)
    ranking.draw(tmp_path / "heads.png")
    assert Image.open(tmp_path / "heads.png").size[0] > 300
    with pytest.raises(ValueError, match="count: expected 1 to 4"):
        ranking.best(5)
    path = tmp_path / "plain.json"
    path.write_text(json.dumps({"format": "sdattn-fast heads", "version": 1, "heads": {"up": [0]}, "notes": {}}))
    with pytest.raises(ValueError, match=r"plain.json: expected a ranking that `sdattn-fast heads` wrote"):
        HeadRanking.load(path)


@pytest.fixture(scope="module")
def clip():
    from sdattn_fast.lab import shapes_path

    pytest.importorskip("transformers")
    return ClipScorer.load(shapes_path() / "clip")


def test_clip_knows_a_true_mask_from_a_false_one(clip):
    seen, texts = [], []
    for seed in range(12):
        scene = sample_scene(30_000_000 + seed, objects=2)
        thing, other = (torch.from_numpy(o.mask).float() for o in scene.objects)
        maps = torch.stack([thing, other, torch.ones(64, 64) - thing, torch.rand(64, 64)])
        seen.append(Observation(seed, Image.fromarray(scene.image), ("x",), HEADS, maps[None].half()))
        texts.append([f"a {scene.objects[0].size} {scene.objects[0].colour} {scene.objects[0].shape}"])
    ranking = rank_heads(seen, clip_score(clip, lambda seen: texts[seen.prompt]), "CLIP of masked pictures")
    scores = ranking.scores
    assert ranking.order[0] == ("down", 0)
    assert scores[("down", 0)] > 0.1 + max(scores[("down", 1)], scores[("up", 0)])


def test_clip_scores(clip):
    scenes = [sample_scene(20_000_000 + i) for i in range(8)]
    pictures, texts = [Image.fromarray(s.image) for s in scenes], [s.caption for s in scenes]
    cosines = clip.similarity(pictures, texts)
    assert cosines.mean() > 0.4 > clip.similarity(pictures, texts[1:] + texts[:1]).mean() + 0.2
    assert clip.texts(["a red circle " * 60]).norm() == pytest.approx(1, abs=1e-5), "77 tokens are kept of more"
    with pytest.raises(ValueError, match="texts: expected one for each of 8 pictures, got 1"):
        clip.similarity(pictures, texts[:1])


def test_every_heads_maps_of_the_words(pipe):
    prompts = ["a red circle and a blue circle", "a large green triangle", "nothing"]
    words = [["circle", "circle (2)"], ["triangle"], []]
    seen = list(observe(pipe, prompts, words, size=32, batch=2, num_inference_steps=2, guidance_scale=4.0))
    assert [(x.prompt, x.words) for x in seen] == [(0, ("circle", "circle (2)")), (1, ("triangle",))]
    assert [tuple(x.maps.shape) for x in seen] == [(2, 28, 32, 32), (1, 28, 32, 32)]
    assert len(set(seen[0].heads)) == 28
    assert len(pipe.tokenizer.tokenize(prompts[1])) == 5, "a triangle is two tokens"
    # One prompt at a time gives the same maps, and the mean over heads is what a patch captures.
    from sdattn_fast import Capture, apply

    layer = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"
    with apply(pipe, capture=Capture(stage="softmax", layers=layer)) as patch:
        pipe(prompts[1], num_inference_steps=2, guidance_scale=4.0, generator=torch.Generator().manual_seed(1))
        tokens = patch.maps[layer][0, [4, 5]].mean(0)
    mean_map = seen[1].maps[0, [i for i, (name, _) in enumerate(seen[1].heads) if name == layer]].float().mean(0) / 1024
    wanted = torch.nn.functional.interpolate(tokens[None, None], size=(32, 32), mode="bicubic")[0, 0]
    torch.testing.assert_close(mean_map, wanted, rtol=2e-2, atol=2e-4)
    with pytest.raises(ValueError, match="words: expected words of the prompt, 'a', 'red'"):
        list(observe(pipe, ["a red circle"], [["bench"]]))
    with pytest.raises(ValueError, match="words: expected one list for each of 2 prompts"):
        list(observe(pipe, ["a", "b"], [["a"]]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": "a red circle"}, "prompts: expected a list of texts"),
        ({"seed": -1}, "seed: expected 0 <= seed"),
        ({"seed": 2**64}, "seed: expected 0 <= seed"),
        ({"size": 10**9}, "size: expected 1 to 8192"),
        ({"batch": 1.5}, "batch: expected an int"),
    ],
)
def test_bad_arguments_of_observe(pipe, changes, says):
    arguments = {"prompts": ["a red circle"], "words": [["circle"]], **changes}
    with pytest.raises((TypeError, ValueError), match=says):
        next(observe(pipe, **arguments))


def test_words_that_the_tokenizer_cut_off_are_left_out(pipe):
    prompt = "red " * 80 + "circle"
    assert list(observe(pipe, [prompt], [["circle"]], num_inference_steps=1)) == []


def test_captions_of_the_world_are_understood():
    for scene in (sample_scene(seed, held_out=bool(seed % 2)) for seed in range(50)):
        assert objects_of(scene.caption) == [(o.colour, o.shape) for o in scene.objects]
        assert bound_objects([scene.caption], [scene.image])[0] == 1.0
    assert words_of_objects("a red star, a blue circle and a pink star") == ["star", "circle", "star (2)"]
    chosen_on, reported = world_subject("shapes", 64, choosing=True), world_subject("shapes", 64)
    assert not set(chosen_on.prompts) & set(reported.prompts)
    assert bound_objects(["a red circle and a blue star"], [np.full((64, 64, 3), 128, np.uint8)])[0] == 0


@pytest.mark.parametrize("world", ["shapes", "objects"])
def test_masks_of_true_scenes_are_the_objects(world):
    subject = world_subject(world, 6, choosing=True)
    for i, scene in enumerate(subject.scenes):
        masks = subject.masks(i, scene.image)
        true = (
            [o.mask for o in scene.objects]
            if world == "shapes"
            else [np.logical_or.reduce([o.mask for o in scene.objects if o.noun == n.noun]) for n in scene.named]
        )
        assert len(masks) == len(true) == len(subject.texts(i))
        for mask, there in zip(masks, true, strict=True):
            assert mask is not None and (mask & there).sum() > 0.8 * (mask | there).sum()
        assert all(mask is None for mask in subject.masks(i, np.full((64, 64, 3), 128, np.uint8)))


def test_the_study(tmp_path, monkeypatch):
    import typer
    from typer.testing import CliRunner

    from sdattn_fast.studies import heads

    def with_few_steps(*args, **how):
        subject = world_subject(*args, **how)
        subject.steps = 3
        return subject

    monkeypatch.setattr(heads, "world_subject", with_few_steps)
    app = typer.Typer()
    app.command()(heads._run)
    options = "--world objects --selection 2 --pictures 2".split()
    assert CliRunner().invoke(app, ["--folder", str(tmp_path), *options], catch_exceptions=False).exit_code == 0
    report = json.loads((tmp_path / "summary.json").read_text())
    assert {"mask IoU, best 1", "mask IoU, best 7"} <= set(report)  # a quarter of 28
    assert set(report["pictures drawn"]) == set(heads._conditions({}))
    assert sum(map(len, load_heads(tmp_path / "mask.json")[0].values())) >= 1
