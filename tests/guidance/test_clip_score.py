"""A CLIP that is not whole, or whose parts do not belong together, is refused when it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("transformers")

from sdattn_fast.guidance.clip_score import ClipScorer
from sdattn_fast.lab import shapes_path


def _change(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _a_text_encoder(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(shapes_path() / "text_encoder" / name, folder / name)


def _without_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.startswith("text_model.encoder.layers.1.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def _half_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _another_width(folder: Path) -> None:
    _change(folder / "config.json", lambda config: config.update(projection_dim=256))


def _a_larger_vocabulary(folder: Path) -> None:
    def more(content: Any) -> None:
        words = content["model"]["vocab"]
        words.update({f"zz{i}</w>": len(words) + i for i in range(7)})

    _change(folder / "tokenizer.json", more)
    _change(folder / "vocab.json", lambda words: more({"model": {"vocab": words}}))  # transformers 4 reads this one


def _another_end(folder: Path) -> None:
    _change(folder / "config.json", lambda config: config["text_config"].update(eos_token_id=7))


def _no_tokenizer(folder: Path) -> None:
    for path in (*folder.glob("tokenizer*"), folder / "vocab.json", folder / "merges.txt"):
        path.unlink()


def _larger_pictures(folder: Path) -> None:
    size = {"height": 96, "width": 96}
    _change(folder / "preprocessor_config.json", lambda content: content.update(size=size, crop_size=size))


@pytest.mark.parametrize(
    "damage, words",
    [
        (_a_text_encoder, "is no whole CLIPModel: .* weights are of another shape"),
        (_without_a_layer, "16 of its 94 weights are missing in its files, such as 'text_model.encoder.layers.1."),
        (_half_the_file, "clip: cannot load .* as a CLIPModel"),
        (_another_width, "2 of its 94 weights are of another shape than its config says"),
        (_a_larger_vocabulary, "clip: its tokenizer has 602 tokens, and its text model knows 595"),
        (_another_end, "clip: its tokenizer ends a text with token 594, its text model with 7"),
        (_no_tokenizer, "clip: its tokenizer knows no words"),
        (_larger_pictures, "gives 96x96 pixels, its vision model takes 64x64"),
    ],
)
def test_what_does_not_belong_together(damage: Any, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(shapes_path() / "clip", folder)
    damage(folder)
    error: type[Exception] = ValueError
    if damage is _no_tokenizer and transformers.__version__.startswith("4."):  # which says so itself
        error, words = OSError, "Can't load tokenizer for "
    with pytest.raises(error, match=words):
        ClipScorer.load(folder)


def test_a_whole_one_is_as_it_was_saved(tmp_path: Path) -> None:
    scorer = ClipScorer.load(shapes_path() / "clip")
    assert not scorer.model.training and not any(p.requires_grad for p in scorer.model.parameters())
    texts = scorer.texts(["a red circle", "a blue square " * 60])
    scorer.model.save_pretrained(tmp_path)
    scorer.tokenizer.save_pretrained(tmp_path)
    scorer.processor.save_pretrained(tmp_path)
    # A tokenizer that says no length: the text model's positions are the limit.
    _change(tmp_path / "tokenizer_config.json", lambda content: content.pop("model_max_length"))
    again = ClipScorer.load(tmp_path).texts(["a red circle", "a blue square " * 60])
    torch.testing.assert_close(again, texts, rtol=1e-5, atol=1e-6)


def test_no_texts_and_no_pictures_are_said() -> None:
    clip = ClipScorer.load(shapes_path() / "clip")
    for texts, error in (([], ValueError), ("a red circle", TypeError), ([1], TypeError)):
        with pytest.raises(error, match="texts: expected"):
            clip.texts(texts)
    with pytest.raises(ValueError, match="pictures: expected at least one"):
        clip.pictures([])
