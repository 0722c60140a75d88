"""Shared by all tests: seeds, and the cases on which fast paths meet the definition."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion
from unsure_rows import unsure_rows


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def triton_of_torch_2_11() -> Path:
    """An older Triton that kernels are compiled with, in build/, where `make test` puts it."""
    if TorchVersion(torch.__version__) < (2, 11):
        pytest.skip("Triton 3.6 comes with torch 2.11 and later ones")
    folder = Path(__file__).parents[1] / "build/triton-3.6.0"
    if not (folder / "triton").is_dir():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{folder} is not there: `make build/triton-3.6.0`")
    return folder


@pytest.fixture(scope="session", name="unsure_rows")
def _unsure_rows():
    return unsure_rows


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The shapes pipeline, without progress bars."""
    pytest.importorskip("diffusers")
    from sdattn_fast.lab import load_pipeline

    found = load_pipeline()
    found.set_progress_bar_config(disable=True)
    return found
