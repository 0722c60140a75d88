"""The optional judges, on small models saved in the formats that users have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sdattn_fast.evaluation.judges import BlipVqa, GenEval, _stands
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
        patch_size=16, num_detection_tokens=4, id2label={0: "car", 1: "bench"}, label2id={"car": 0, "bench": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer.load(shapes_path() / "clip")


def _judge(detector: Path, scorer: Any, wanted: Any, found: list[tuple[int, tuple[float, ...]]]) -> GenEval:
    """The loaded judge, told what its detector finds: a detector that was trained is what a user brings."""
    judge = GenEval(str(detector), scorer, [wanted])
    answer = {
        "labels": torch.tensor([label for label, _ in found]),
        "boxes": torch.tensor([box for _, box in found]).reshape(-1, 4),
    }
    judge.processor.post_process_object_detection = lambda *a, **k: [answer]
    return judge


CAR, BENCH = (0, (2.0, 2.0, 8.0, 8.0)), (1, (20.0, 2.0, 28.0, 8.0))


@pytest.mark.parametrize(
    "wanted, found, right",
    [
        ([{"class": "car"}], [CAR], True),
        ([{"class": "car"}], [BENCH], False),
        ([{"class": "car", "count": 2}], [CAR, CAR], True),
        ([{"class": "car", "count": 2}], [CAR], False),
        ([{"class": "car", "count": 1}], [CAR, CAR], False),
        ([{"class": "car"}, {"class": "bench"}], [CAR, BENCH], True),
        ([{"class": "car"}, {"class": "bench", "position": ["right of", 0]}], [CAR, BENCH], True),
        ([{"class": "car"}, {"class": "bench", "position": ["left of", 0]}], [CAR, BENCH], False),
    ],
)
def test_geneval(wanted: Any, found: Any, right: bool, detector: Path, scorer: ClipScorer) -> None:
    judge = _judge(detector, scorer, wanted, found)
    assert judge.measure([0], [RED], [[]]) == [{"GenEval": float(right)}]


def test_geneval_runs_its_detector_and_names_what_is_wrong(detector: Path, scorer: ClipScorer) -> None:
    judge = GenEval(str(detector), scorer, [[{"class": "car"}], []], threshold=0.0)
    rows = judge.measure([0, 1], [RED, RED], [[], []])
    assert rows[0]["GenEval"] in (0.0, 1.0) and np.isnan(rows[1]["GenEval"])
    with pytest.raises(ValueError, match="entry 0 expected a class among the detector's 2"):
        GenEval(str(detector), scorer, [[{"class": "unicorn"}]])
    with pytest.raises(ValueError, match="expected a position"):
        _stands((0, 0, 1, 1), (2, 2, 3, 3), "inside")


def test_colours_come_from_clip(detector: Path, scorer: ClipScorer) -> None:
    colour = _judge(detector, scorer, [], [])._colour(RED, (0.0, 0.0, 31.0, 31.0), "circle")
    texts = scorer.texts([f"a photo of a {c} circle" for c in GenEval.COLOURS])
    assert colour == GenEval.COLOURS[int((texts @ scorer.pictures([RED[:31, :31]])[0]).argmax())]


def test_the_prompts_file_has_genevals_entries(tmp_path: Path) -> None:
    from sdattn_fast.cli.prompts import read_prompts

    path = tmp_path / "prompts.txt"
    path.write_text(json.dumps({"prompt": "a car", "include": [{"class": "car"}]}) + "\na bench\n")
    assert [p.include for p in read_prompts(path)] == [({"class": "car"},), ()]
    path.write_text('{"prompt": "a car", "include": "car"}')
    with pytest.raises(ValueError, match="include"):
        read_prompts(path)
