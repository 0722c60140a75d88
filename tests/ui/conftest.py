"""The shapes pipeline and its CLIP, and the tiny models, for every test of this folder."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import _one_thread, build, parts, tokenizer, tokenizer_2  # noqa: F401

pytest.importorskip("textblob")
pytest.importorskip("kornia")

from sdattn_fast.guidance.clip_score import ClipScorer
from sdattn_fast.lab import load_pipeline, shapes_path


@pytest.fixture(scope="session")
def shapes() -> Any:
    made = load_pipeline()
    made.set_progress_bar_config(disable=True)
    made.unet.requires_grad_(False)
    made.vae.requires_grad_(False)
    return made


@pytest.fixture(scope="session")
def clip() -> str:
    return str(shapes_path() / "clip")


@pytest.fixture(scope="session")
def scorer(clip: str) -> ClipScorer:
    return ClipScorer.load(clip)
