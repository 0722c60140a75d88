"""Folders of pictures and captions, and what is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdattn_fast.training import CaptionedFolder


def _picture(path: Path, size: tuple[int, int] = (8, 6)) -> None:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = (255, 0, 0)
    Image.fromarray(pixels).save(path)


def test_text_beside_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a.bmp"):
        _picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f" a picture\n{name} ")
    (tmp_path / "notes.md").write_text("not a picture")
    folder = CaptionedFolder(tmp_path)
    assert [folder.caption(i) for i in range(len(folder))] == ["a picture a.bmp", "a picture b.png"]


def test_a_table(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    _picture(tmp_path / "sub" / "x.png")
    rows = [{"file_name": "sub/x.png", "text": "a red half"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    folder = CaptionedFolder(str(tmp_path))
    assert len(folder) == 1 and folder.caption(0) == "a red half"
    picture = folder.picture(0, (4, 8))
    assert picture.shape == (3, 4, 8) and picture.dtype == torch.float32
    assert picture[0, :, 0].min() > 0.9 and picture[:, :, -1].max() < -0.9
    assert torch.equal(folder.picture(0, (4, 8), flip=True), picture.flip(-1))


def test_a_picture_is_cropped_to_its_middle(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png", (40, 10))
    (tmp_path / "a.txt").write_text("wide")
    picture = CaptionedFolder(tmp_path).picture(0, (10, 10))
    assert picture[0, 5, 0] > 0.9 and picture[0, 5, 9] < -0.9  # the colours' border is in the middle


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: expected a folder"):
        CaptionedFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got none"):
        CaptionedFolder(tmp_path)
    _picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has no caption"):
        CaptionedFolder(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        CaptionedFolder(tmp_path).picture(0, (8, 8))
    for line in (
        "{",
        '{"file_name": "a.png"}',
        "[1]",
        '{"file_name": "b.png", "text": "b"}',
        '{"file_name": "a.png", "text": 3}',
    ):
        (tmp_path / "metadata.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match="line 1: expected"):
            CaptionedFolder(tmp_path)
