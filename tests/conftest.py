"""Shared by all tests: seeds, and the cases on which fast paths meet the definition."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
