"""Paired timing calls its contestants in turn; the memory count counts what lives at once, and no more."""

from __future__ import annotations

import torch

from sdattn_fast.cli.timing import alternate, peak_tensor_bytes


def test_contestants_take_turns():
    calls = []
    took = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, least=3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert set(took) == {"a", "b"}


def test_peak_is_of_what_lives_at_once():
    x = torch.ones(1000)

    def run():
        y = x + 1
        z = y + 1
        del y
        return (z + 1).view(10, 100)

    assert peak_tensor_bytes(run) == 8000


def test_views_and_what_was_there_before_do_not_count():
    x = torch.ones(1000)
    assert peak_tensor_bytes(lambda: x.view(10, 100).add_(1)) == 0
