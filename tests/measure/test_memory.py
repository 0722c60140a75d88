"""The memory count counts what lives at once, and no more."""

from __future__ import annotations

import torch

from sdattn_fast.measure.memory import peak_mib

SCALARS = 64  # bytes of the numbers that torch wraps as tensors


def test_peak_is_of_what_lives_at_once():
    x = torch.ones(1000)

    def run():
        y = x + 1
        z = y + 1
        del y
        return (z + 1).view(10, 100)

    assert 8000 <= peak_mib(run) * 2**20 < 8000 + SCALARS


def test_views_and_what_was_there_before_do_not_count():
    x = torch.ones(1000)
    assert peak_mib(lambda: x.view(10, 100).add_(1)) * 2**20 < SCALARS
