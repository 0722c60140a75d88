"""Prepared calls rewritten where they lie."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.execute import Prepared
from sdattn_fast.functional import prepare
from sdattn_fast.patching.rewrite import difference, rewrite

B, H, N, M, D = 2, 2, 20, 6, 8
ROWS = Program(SalienceDropout(0.3), Refinement(1, 0.2, 0.0), "content")
OVER = Program(SalienceDropout(0.3, axis="space"), Refinement(2, 0.2, 0.7))


def call(content: int = 12, program: Program = ROWS, **changes: Any) -> Prepared:
    numbers = torch.Generator().manual_seed(content)
    side: dict[str, Any] = dict(
        gate=2 * torch.rand(B, N, generator=numbers), phrases=torch.randint(-1, 4, (B, N), generator=numbers),
        protected=(torch.arange(N) >= content).expand(B, N).clone(), active=torch.tensor([content % 2 == 0, True]),
    )  # fmt: skip
    return prepare(program, **{**dict(batch=B, heads_count=H, tokens=N, device="cpu"), **side, **changes})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("program", [ROWS, OVER, Program()], ids=["rows", "over the picture", "folded"])
@pytest.mark.parametrize("capture", [None, Capture(tokens=(0, 3), stage="final")])
def test_a_rewritten_call_is_the_other_one(backend: str, program: Program, capture: Capture | None) -> None:
    held = call(12, program, capture=capture, backend=backend)
    other = call(7, program, capture=capture, backend=backend)
    qkv = [torch.randn(B, H, n, D) for n in (M, N, N)]
    places = [x.data_ptr() for x in held.tensors()]
    before = held(*qkv, grid=(2, 3))
    expected = other(*qkv, grid=(2, 3))
    assert difference(held, other) is None
    rewrite(held, other)
    got = held(*qkv, grid=(2, 3))
    assert [x.data_ptr() for x in held.tensors()] == places
    assert held.home is other
    for mine, theirs, old in zip(got, expected, before, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert torch.allclose(mine, theirs, atol=1e-6) and not torch.allclose(mine, old, atol=1e-3)


def test_what_backends_derived_is_derived_again_in_place() -> None:
    held, other = call(12), call(7)
    assert held.plan is not None and other.plan is not None
    made: list[int] = []

    def order(content: Tensor) -> Tensor:
        made.append(1)
        return content.argsort(dim=-1, descending=True, stable=True)

    rows = held.plan.rows
    assert rows.content is not None and other.plan.rows.content is not None
    before = rows.derive("order", rows.content, order)
    assert rows.derive("order", rows.content, order) is before and len(made) == 1
    rewrite(held, other)
    assert rows.derive("order", rows.content, order).data_ptr() == before.data_ptr() and len(made) == 2
    assert torch.equal(before, order(other.plan.rows.content))
    rows.content.zero_()  # by somebody else: what is kept is not taken for it
    assert torch.equal(rows.derive("order", rows.content, order), order(rows.content))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(content=20), "up to 16 content tokens were there, now there are up to 20"),
        (dict(gate=None), "gate was there, now it is not"),
        (dict(gate=torch.ones(B, H, N)), r"gate was \(2, 1, 20\) torch.float32, now it is \(2, 2, 20\)"),
        (dict(gate=torch.ones(B, N, dtype=torch.float64)), "gate was .* torch.float32, now it is .* torch.float64"),
        (dict(phrases=None), "phrases was there, now it is not"),
        (dict(batch=3, active=torch.ones(3, dtype=torch.bool), gate=None, phrases=None, protected=None), "batch was 2"),
        (dict(program=replace(ROWS, renormalize="row")), "renormalize was 1, now it is 2"),
    ],
)
def test_what_has_no_room_is_said(changes: dict[str, Any], words: str) -> None:
    why = difference(call(), call(**changes))
    assert why is not None
    assert re.search(words, why)
