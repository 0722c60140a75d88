"""The backward kernels against autograd through the definition in float64, given the forward kernel's own selection.
Not collected by itself: see interpreted_rows.py.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from chosen_cases import ALL, pairwise
from given_decisions import (
    CASES,
    EVERYTHING,
    FULL,
    SIZES,
    Case,
    assert_close,
    given,
    inputs_for,
    inputs_of,
    make_program,
    stored_relevance,
    through_autograd,
)  # fmt: skip
from poison import poison

from sdattn_fast import Capture, semantic_attention
from sdattn_fast.backend import autograd
from sdattn_fast.backend import triton as backend
from sdattn_fast.functional import prepare
from sdattn_fast.plan import make_plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHOLE = ALL or not INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(autouse=True)
def _few_processors(monkeypatch):
    """So that a launch program walks over several tiles, and there is more than one."""
    monkeypatch.setattr(backend.gpu, "num_sms", lambda device: 2)


def _cases():
    """The interpreter is slow: there, smaller ones, a third of them in half precision; and unless all are asked for, of
    the captures those that hold every pair of options, and fewer rows where size is not what a case is about."""
    chosen = pairwise(("softmax", "final"), ("mean", "none"), ("plain", "zero"))
    for i, case in enumerate(CASES):
        b, h, m, *more = case.shape
        if not WHOLE and case.capture is not None:
            if (case.capture.stage, case.capture.reduce, case.side["inactive_heads"]) not in chosen:
                continue
        for dtype in DTYPES:
            if INTERPRETED and dtype != torch.float32 and i % 3 != 2:
                continue
            most = 35 if dtype == torch.float32 else 70  # three tiles of rows; half of it is two
            most = most if ALL or i < SIZES else (most + 3) // 2
            one = replace(case, shape=(b, min(h, 2), min(m, most), *more)) if INTERPRETED else case
            yield pytest.param(one, dtype, id=f"{one}-{dtype}")


@pytest.mark.parametrize("case, dtype", _cases())
def test_gradients_given_the_decisions(case, dtype, monkeypatch):
    torch.manual_seed(0)
    inputs, side = inputs_for(case, dtype, DEVICE)
    rows = make_plan(case.program, side, case.capture).rows
    grad_out = torch.randn(*case.shape[:3], case.shape[5]).to(DEVICE, dtype)
    ours, kept, grad_maps = through_autograd("triton", case, inputs, rows, grad_out)
    exact = given(kept, case, inputs, side, grad_out, grad_maps, torch.float64, monkeypatch)
    plain = given(kept, case, inputs, side, grad_out, grad_maps, dtype, monkeypatch)
    for name in ours:
        assert_close(name, ours[name], exact[name], plain[name], inputs[name].dtype)


@pytest.mark.parametrize("which", range(5))
def test_each_gradient_alone(which, monkeypatch):
    torch.manual_seed(0)
    case = Case((2, 2, 40 if WHOLE else 20, 20, 24, 24), has=EVERYTHING, bias=("column", "full")[which % 2])
    inputs, side = inputs_for(case, torch.float32, DEVICE)
    rows = make_plan(FULL, side).rows
    query, key, value, bias = inputs_of(inputs)
    out, _, bits = backend.attention(query, key, value, bias, 0.2, rows, return_bits=True)
    every = backend.backward(out, None, query, key, value, bias, 0.2, rows, bits, [True] * 5 + [False])
    wanted = [i == which for i in range(5)] + [False]
    alone = backend.backward(out, None, query, key, value, bias, 0.2, rows, bits, wanted)
    assert [x is not None for x in alone] == wanted
    torch.testing.assert_close(alone[which], every[which])


@pytest.mark.parametrize("chosen", [None, [0, 2]])
@pytest.mark.parametrize("maps", [False, True])
def test_relevance_is_that_of_the_stored_map(maps, chosen):
    torch.manual_seed(0)
    b, h, m, n = 2, 3, 70 if WHOLE else 40, 20
    query, key, value = (torch.randn(b, h, s, 16, device=DEVICE) for s in (m, n, n))
    tokens = [4, 0, 19]
    grad_out, grad_maps = torch.randn(b, h, m, 16, device=DEVICE), torch.randn(b, 2, m, device=DEVICE) * maps
    side = {
        "protected": torch.rand(b, n, device=DEVICE) > 0.6,
        "gate": torch.rand(b, n, device=DEVICE),
        "heads": [0, 1],
        "active": torch.tensor([True, False], device=DEVICE),
    }
    want = stored_relevance(query, key, value, side, grad_out, grad_maps)
    want = want[:, :, :, tokens] if chosen is None else want[:, chosen][:, :, :, tokens]
    sink = torch.zeros(b, len(tokens), m, requires_grad=True, device=DEVICE)
    heads = None if chosen is None else torch.tensor([i in chosen for i in range(h)], device=DEVICE).to(torch.uint8)
    asked = autograd.Relevance(sink, torch.tensor(tokens, dtype=torch.int32, device=DEVICE), heads)
    call = prepare(
        FULL, batch=b, heads_count=h, tokens=n, device=query.device, **side, capture=Capture((1, 2)), backend="triton"
    )
    out, captured = call(query, key, value, relevance=asked)
    (got,) = torch.autograd.grad((out * grad_out).sum() + (captured * grad_maps).sum(), sink)
    torch.testing.assert_close(got, want.sum(1).transpose(1, 2).float(), rtol=1e-3, atol=1e-5)


def test_the_same_numbers_every_time():
    m = 100 if WHOLE else 70
    case = Case((2, 2, m, 30, 40, 24), has=EVERYTHING, bias="pixel")
    inputs, side = inputs_for(case, torch.float16, DEVICE)
    rows = make_plan(FULL, side).rows
    grad_out = torch.randn(2, 2, m, 24).to(DEVICE, torch.float16)
    once, again = (through_autograd("triton", case, inputs, rows, grad_out)[0] for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_strides():
    torch.manual_seed(0)
    plain = [torch.randn(1, s, 3, 24, device=DEVICE) for s in (40, 20, 20)]
    grad = torch.randn(1, 3, 40, 24, device=DEVICE)

    def grads(inputs, grad):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = semantic_attention(*inputs, FULL, backend="triton")
        return torch.autograd.grad(out, inputs, grad)

    want = grads([x.transpose(1, 2).contiguous() for x in plain], grad)
    turned = grad.transpose(2, 3).contiguous().transpose(2, 3)  # its last dimension is not contiguous
    for some in (grad, turned, grad.transpose(1, 2).contiguous().transpose(1, 2)):
        for mine, theirs in zip(grads([x.transpose(1, 2) for x in plain], some), want, strict=True):
            torch.testing.assert_close(mine, theirs)
    one = torch.ones(1, device=DEVICE).expand(1, 3, 40, 24)
    for mine, theirs in zip(grads(plain_heads(plain), one), grads(plain_heads(plain), one.clone()), strict=True):
        torch.testing.assert_close(mine, theirs)


def plain_heads(plain):
    return [x.transpose(1, 2) for x in plain]


@pytest.mark.parametrize("empty", range(4))
def test_empty(empty):
    shape = [2, 2, 5, 6]
    shape[empty] = 0
    b, h, m, n = shape
    inputs = [torch.randn(b, h, s, 8, device=DEVICE, requires_grad=True) for s in (m, n, n)]
    out = semantic_attention(*inputs, FULL, backend="triton")
    for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert grad.shape == x.shape and not grad.isnan().any()


def test_nan_stays_in_its_row_and_in_the_sums_over_rows():
    query, key, value = (torch.randn(1, 2, n, 24, device=DEVICE).requires_grad_() for n in (40, 20, 20))
    bias = torch.zeros(1, 1, 40, 20, device=DEVICE)
    bias[0, 0, 9] = -float("inf")
    with torch.no_grad():
        query[0, 1, 39, 3] = float("nan")
    out = semantic_attention(query, key, value, FULL, bias=bias, backend="triton")
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert grads[0][0, 1, 39].isnan().all() and grads[0].isnan().any(-1).sum() == 1
    assert (grads[0][0, :, 9] == 0).all()
    assert not grads[1][0, 0].isnan().any() and grads[1][0, 1].isnan().all()


@pytest.mark.parametrize("renormalize", ["content", "row"])
def test_what_is_left_may_be_next_to_nothing(renormalize):
    inputs = [torch.randn(1, 1, s, 16, device=DEVICE).requires_grad_() for s in (20, 6, 6)]
    bias = torch.tensor([0.0, *(-80 - 0.5 * i for i in range(5))], device=DEVICE).expand(1, 1, 20, 6)
    program = make_program(0.2, None, renormalize)
    out = semantic_attention(*inputs, program, bias=bias, scale=0.01, backend="triton")
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))
