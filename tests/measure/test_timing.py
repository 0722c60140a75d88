"""Paired timing calls its contestants in turn."""

from __future__ import annotations

from sdattn_fast.measure.timing import alternate


def test_contestants_take_turns():
    calls = []
    took = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, least=3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert set(took) == {"a", "b"}
