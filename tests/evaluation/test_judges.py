"""The optional judges, on small models saved in the formats that users have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sdattn_fast.evaluation.judges import BlipVqa, BoxDetector, GenEval, Spatial
from sdattn_fast.guidance.clip_score import ClipScorer
from sdattn_fast.lab import shapes_path

RED = np.full((32, 32, 3), (255, 0, 0), np.uint8)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "red", "car", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 16,
            "encoder_hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "bos_token_id": 2,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        projection_dim=8,
        image_text_hidden_size=8,
    )
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_blip_answers_for_each_phrase(blip: Path) -> None:
    judge = BlipVqa(str(blip))
    rows = judge.measure([0, 1, 2], [RED] * 3, [["a red car"], ["a red car", "car"], []])
    one, two, none = (row["BLIP-VQA"] for row in rows)
    assert 0 < two < one < 1 and np.isnan(none)
    (single,) = judge.measure([0], [RED], [["car"]])
    # A product over phrases.
    assert two == pytest.approx(one * single["BLIP-VQA"], rel=1e-6)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=16, num_detection_tokens=4, id2label={0: "car", 1: "bench", 2: "mouse"},
        label2id={"car": 0, "bench": 1, "mouse": 2},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer.load(shapes_path() / "clip")


Found = list[tuple[int, tuple[float, ...]]]


def _finds(detector: Path, boxes: Found, score: float = 0.95) -> BoxDetector:
    """The loaded detector, told what it finds, each less surely than the one before: one that was trained is what a
    user brings."""
    made = BoxDetector(str(detector))
    answer = {
        "labels": torch.tensor([label for label, _ in boxes], dtype=torch.int64),
        "scores": torch.tensor([score - 0.01 * i for i in range(len(boxes))]),
        "boxes": torch.tensor([box for _, box in boxes]).reshape(-1, 4),
    }

    def post_process(outputs: Any, threshold: float, target_sizes: Any) -> list[dict[str, torch.Tensor]]:
        return [{name: x[answer["scores"] > threshold].flip(0) for name, x in answer.items()}]

    made.processor.post_process_object_detection = post_process
    return made


CAR, BENCH = (0, (2.0, 2.0, 8.0, 8.0)), (1, (20.0, 2.0, 28.0, 8.0))
BELOW, ASKEW, NEAR = (1, (2.0, 20.0, 8.0, 28.0)), (1, (12.0, 12.0, 18.0, 18.0)), (1, (2.5, 2.0, 8.5, 8.0))
ONE = {"class": "car", "count": 1}


@pytest.mark.parametrize(
    "wanted, boxes, right",
    [
        ({"include": [{"class": "car"}]}, [CAR], True),
        ({"include": [ONE]}, [BENCH], False),
        ({"include": [{"class": "car", "count": 2}]}, [CAR, CAR], True),
        ({"include": [{"class": "car", "count": 2}]}, [CAR], False),
        # More than asked for is wrong where the entry says so, and there alone.
        ({"include": [ONE], "tag": "single_object"}, [CAR, CAR], True),
        ({"include": [ONE], "exclude": [{"class": "car", "count": 2}], "tag": "counting"}, [CAR, CAR], False),
        ({"include": [ONE], "exclude": [{"class": "car", "count": 2}], "tag": "counting"}, [CAR, BENCH], True),
        ({"include": [ONE, {"class": "bench", "count": 1}]}, [CAR, BENCH], True),
        ({"include": [ONE, {"class": "bench", "count": 1}]}, [CAR], False),
        ({"include": [ONE, {"class": "bench", "position": ["right of", 0]}]}, [CAR, BENCH], True),
        ({"include": [ONE, {"class": "bench", "position": ["left of", 0]}]}, [CAR, BENCH], False),
        ({"include": [ONE, {"class": "bench", "position": ["below", 0]}]}, [CAR, BELOW], True),
        # The surest bench is asked for its place, not any.
        ({"include": [ONE, {"class": "bench", "position": ["below", 0]}]}, [CAR, BENCH, BELOW], False),
        # Askew stands both ways; what nearly covers the other stands in none.
        ({"include": [ONE, {"class": "bench", "position": ["right of", 0]}]}, [CAR, ASKEW], True),
        ({"include": [ONE, {"class": "bench", "position": ["below", 0]}]}, [CAR, ASKEW], True),
        ({"include": [ONE, {"class": "bench", "position": ["right of", 0]}]}, [CAR, NEAR], False),
        ({"include": [{"class": "computer mouse"}]}, [CAR], False),
        ({}, [CAR], None),
    ],
)
def test_geneval(wanted: Any, boxes: Found, right: bool | None, detector: Path, scorer: ClipScorer) -> None:
    (row,) = GenEval(_finds(detector, boxes), scorer, [wanted]).measure([0], [RED], [[]])
    assert row["GenEval"] == right if right is not None else np.isnan(row["GenEval"])


def test_counting_is_stricter_and_colours_are_of_the_surest(detector: Path, scorer: ClipScorer) -> None:
    unsure = _finds(detector, [CAR], score=0.5)
    wanted = [{"include": [ONE]}, {"include": [ONE], "tag": "counting"}]
    rows = GenEval(unsure, scorer, wanted).measure([0, 1], [RED, RED], [[], []])
    assert [row["GenEval"] for row in rows] == [1.0, 0.0]
    judge = GenEval(_finds(detector, [CAR, CAR]), scorer, [{"include": [{**ONE, "color": "red"}]}])
    judge._colour = lambda picture, one, name: "red" if one.score > 0.945 else "blue"  # type: ignore[method-assign]
    assert judge.measure([0], [RED], [[]]) == [{"GenEval": 1.0}]
    judge.wanted = [{"include": [{"class": "car", "count": 2, "color": "red"}]}]
    assert judge.measure([0], [RED], [[]]) == [{"GenEval": 0.0}]


@pytest.mark.parametrize(
    "prompt, phrases, boxes, score",
    [
        # Two scores a quarter each, half for the place.
        ("a car on the left of a bench", ["a car", "a bench"], [CAR, BENCH], 0.25 * (0.95 + 0.94) + 0.5),
        ("a car on the right of a bench", ["a car", "a bench"], [CAR, BENCH], 0.0),
        ("a car on the top of a bench", ["a car", "a bench"], [CAR, BELOW], 0.25 * (0.95 + 0.94) + 0.5),
        ("a car on the bottom of a bench", ["a car", "a bench"], [CAR, BELOW], 0.0),
        # Near is 150 of 512 pixels; these are 10 of 32 apart both ways.
        ("a red car next to a bench", ["a red car", "a bench"], [CAR, BENCH], 0.25 * (0.95 + 0.94) + 0.5),
        ("a red car near a bench", ["a red car", "a bench"], [CAR, ASKEW], 0.25 * (0.95 + 0.94) + 0.5 * 9.375 / 10),
        ("a car on the left of a bench", ["a car", "a bench"], [CAR], 0.0),
        # Overlapping by more than a tenth: 0.1 / IoU.
        ("a car on the left of a bench", ["a car", "a bench"], [CAR, NEAR], 0.25 * (0.95 + 0.94) + 0.05 * 39 / 33),
        ("a car on the left of a car", ["a car", "a car"], [CAR, (0, BENCH[1])], 0.25 * (0.95 + 0.94) + 0.5),
        ("a car and a bench", ["a car", "a bench"], [CAR, BENCH], None),
        ("a car on the left of a unicorn", ["a car", "a unicorn"], [CAR, BENCH], None),
    ],
)
def test_spatial(prompt: str, phrases: list[str], boxes: Found, score: float | None, detector: Path) -> None:
    (row,) = Spatial(_finds(detector, boxes), [prompt]).measure([0], [RED], [phrases])
    assert row["T2I spatial"] == pytest.approx(score, abs=1e-4) if score is not None else np.isnan(row["T2I spatial"])


def test_a_detector_runs(detector: Path, scorer: ClipScorer) -> None:
    finds = BoxDetector(str(detector))
    found = finds(RED, 0.0)
    assert len(found) == 4 and [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert {one.label for one in found} <= {"car", "mouse", "bench"} and finds(RED, 1.0) == []
    assert finds.label("computer mouse") == "mouse" and finds.label("bench") == "bench" and finds.label("dog") is None


@pytest.mark.parametrize(
    "wanted, words",
    [
        ({"include": [{"class": "unicorn"}]}, "prompt 2, 'include': the detector knows no 'unicorn', but 3 other"),
        ({"include": ["car"]}, "prompt 2, 'include': expected entries such as"),
        ({"include": [{"class": "car", "count": 0}]}, '"count" to be an int >= 1'),
        ({"include": [{"class": "car", "color": "beige"}]}, '"color" among red, orange'),
        ({"include": [{"class": "car", "position": ["left of", 0]}]}, '"position" to be a relation'),
        ({"include": [ONE, {"class": "car", "position": ["inside", 0]}]}, '"position" to be a relation'),
        ({"include": [ONE], "exclude": [{"class": "unicorn"}]}, "prompt 2, 'exclude': the detector knows no 'unicorn'"),
    ],
)
def test_entries_that_geneval_has_not(wanted: Any, words: str, detector: Path, scorer: ClipScorer) -> None:
    with pytest.raises(ValueError, match=words):
        GenEval(BoxDetector(str(detector)), scorer, [{}, wanted])


def test_models_that_are_not_whole(blip: Path, detector: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for folder, judge, name in ((blip, BlipVqa, "blip"), (detector, BoxDetector, "detector")):
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        weights = load_file(broken / "model.safetensors")
        weights.pop(min(weights))
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{name}: .* is no whole .* 1 of its"):
            judge(str(broken))


def test_colours_come_from_clip(detector: Path, scorer: ClipScorer) -> None:
    (box,) = _finds(detector, [(0, (0.0, 0.0, 31.0, 31.0))])(RED, 0.3)
    judge = GenEval(_finds(detector, []), scorer, [{}])
    said = ("a photo of a {} circle", "a photo of a {}-colored circle", "a photo of a {} object")
    texts = [torch.nn.functional.normalize(scorer.texts([s.format(c) for s in said]).mean(0), dim=0)
             for c in GenEval.COLOURS]  # fmt: skip
    expected = int((torch.stack(texts) @ scorer.pictures([RED[:31, :31]])[0]).argmax())
    assert judge._colour(RED, box, "circle") == GenEval.COLOURS[expected]


def test_the_prompts_file_may_be_genevals(tmp_path: Path) -> None:
    from sdattn_fast.prompts import read_prompts

    path = tmp_path / "evaluation_metadata.jsonl"
    line = {
        "tag": "counting",
        "include": [ONE],
        "exclude": [{"class": "car", "count": 2}],
        "prompt": "a photo of a car",
    }
    path.write_text(json.dumps(line) + "\na bench\n")
    read = read_prompts(path)
    assert [p.text for p in read] == ["a photo of a car", "a bench"]
    assert read[0].geneval == {name: line[name] for name in ("include", "exclude", "tag")} and read[1].geneval == {}
    path.write_text('{"prompt": "a car", "exclude": "car"}')
    with pytest.raises(ValueError, match='"exclude" to be a list'):
        read_prompts(path)
