"""The shapes pipeline, and tiny models of other architectures, for every test of this folder."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import _one_thread, build, parts, tokenizer, tokenizer_2  # noqa: F401

pytest.importorskip("diffusers")
pytest.importorskip("textblob")

from sdattn_fast.lab import load_pipeline


@pytest.fixture(scope="session")
def shapes() -> Any:
    made = load_pipeline()
    made.set_progress_bar_config(disable=True)
    return made
