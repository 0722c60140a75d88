"""The kernels on tensors in every layout. Run as interpreted_rows.py is."""

from __future__ import annotations

import memory_layouts
import pytest
import torch
from chosen_cases import ALL, pairwise
from memory_layouts import HEAD_DIMENSIONS, LAYOUTS
from poison import poison
from tested_backend import DEVICE, INTERPRETED, NAME, backend

WHOLE = ALL or not INTERPRETED


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


CHECKS = {
    "triton": [
        (memory_layouts.check_attention, torch.float32),
        (memory_layouts.check_backward, torch.float32),
        (memory_layouts.check_folded, torch.float16),
        (memory_layouts.check_smooth, torch.float32),
    ],
    "cuda": [(memory_layouts.check_attention, torch.float32), (memory_layouts.check_smooth, torch.float32)],
}


def name(x):
    return x[0].__name__.removeprefix("check_") if isinstance(x, tuple) else str(x)


@pytest.mark.parametrize("laid, check, d", pairwise(LAYOUTS, CHECKS[NAME], HEAD_DIMENSIONS, whole=WHOLE), ids=name)
def test_any_layout_is_served_right_or_refused(laid, check, d):
    function, dtype = check
    function(backend, d, dtype, DEVICE, laid)
