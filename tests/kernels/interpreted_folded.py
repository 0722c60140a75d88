"""The folded layer's kernel against the definition in float64. As interpreted_rows.py, not collected by itself."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chosen_cases import ALL, pairwise
from poison import poison

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.backend.triton import folded_layers
from sdattn_fast.folded_layer import call_folded, fold_refusal
from sdattn_fast.folded_layer import fold as fold_text
from sdattn_fast.functional import prepare
from sdattn_fast.reference import reference_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHOLE = ALL or not INTERPRETED
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
EPS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of P and of the output, each rounded once

PROGRAMS = {
    "plain": Program(),
    "full": Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0), "content"),
    "row": Program(SalienceDropout(0.3), renormalize="row"),
    "random": Program(SalienceDropout(0.4, mode="random"), renormalize="row"),
    "smooth": Program(SalienceDropout(0.2), Refinement(1, 0.2, 0.7), "content"),
}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def case(program, b=2, h=3, grid=(5, 9), n=77, d=40, dv=24, dtype=torch.float16, content=12, shared=True, **side):
    """A folded layer's inputs, its prepared call, and what float64 makes of them."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    m = grid[0] * grid[1]
    x = randn(b, m, d) if shared else randn(b, h, m, d)
    key, value, out_bias = randn(b, h, n, d), randn(b, h, n, dv), randn(dv)
    protected = torch.ones(b, n, dtype=torch.bool, device=DEVICE)
    protected[:, 1 : 1 + content] = False
    protected[b - 1, 2 : 2 + content // 2] = True  # entries differ
    side = {"gate": torch.rand(b, n, generator=generator).to(DEVICE) + 0.5, "protected": protected, **side}
    prepared = prepare(program, batch=b, heads_count=h, tokens=n, device=DEVICE, seed=9, backend="triton", **side)
    return SimpleNamespace(x=x, key=key, value=value, out_bias=out_bias, prepared=prepared, grid=grid, shared=shared)


def check(c, summed=True, bias=None, scale=0.2) -> Any:
    p = c.prepared
    fold = fold_text(
        p, c.key, p.fold_value(c.value), c.shared, summed, scale, out_bias=c.out_bias.float() if summed else None
    )
    assert fold_refusal(p, c.x) is None
    y, maps = call_folded(p, c.x, fold, bias=bias, grid=c.grid)
    assert maps is None and y.dtype == c.x.dtype
    query = c.x[:, None].expand(-1, c.key.shape[1], -1, -1) if c.shared else c.x
    side = p.side
    exact, _ = reference_attention(
        query.double(), c.key.double(), c.value.double(), p.program, scale=scale, grid=c.grid, seed=9,
        bias=None if bias is None else bias.double(), gate=side.gate, phrases=side.phrases, protected=side.protected,
        active=side.active, heads=side.heads, inactive_heads=side.inactive_heads,
    )  # fmt: skip
    if summed:
        exact = exact.sum(1) + c.out_bias.double()
    assert y.shape == exact.shape
    # No margin of these inputs is as small as a rounding error, so that every decision is float64's.
    torch.testing.assert_close(y.double(), exact, atol=EPS[c.x.dtype] * float(exact.abs().max()), rtol=0)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", ["query", "out", "both"])
def test_kinds_and_programs(kind, program, dtype):
    check(case(PROGRAMS[program], dtype=dtype, shared=kind != "out"), summed=kind != "query")


@pytest.mark.parametrize("n", [1, 16, 17, 77, 96, 154])
def test_tokens(n):
    check(case(PROGRAMS["full"], n=n, content=min(12, n - 1)))
    check(case(PROGRAMS["full"], n=n, content=n - 1))


@pytest.mark.parametrize("d,dv", [(1, 1), (37, 37), (64, 7), (130, 96), (320, 320)])
def test_channels(d, dv):
    check(case(PROGRAMS["full"], d=d, dv=dv), scale=d**-0.5)


def test_words_entries_and_bias():
    phrases = torch.full((2, 77), -1, device=DEVICE)
    phrases[:, 3:6] = 0
    active = torch.tensor([True, False], device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(2, 3, 1, 77, generator=generator).to(DEVICE)
    for name in ("full", "plain"):
        check(case(PROGRAMS[name], phrases=phrases, active=active), bias=bias)
        check(case(PROGRAMS[name], phrases=phrases, gate=torch.rand(2, 3, 77, generator=generator).to(DEVICE)))


@pytest.mark.parametrize(
    "shared, heads, inactive, summed",
    pairwise([True, False], [[0, 2], [1], []], ["plain", "zero"], [True, False], whole=WHOLE),
)
def test_heads(shared, heads, inactive, summed):
    c = case(PROGRAMS["random"], heads=heads, inactive_heads=inactive, shared=shared)
    check(c, summed)
    if inactive == "zero":
        assert fold_text(c.prepared, c.key, c.value, shared, summed, 1.0).packed.key.shape[1] == len(heads)


def test_rows_beyond_a_block(monkeypatch):
    """What lies between the two products is a block of rows, and the blocks make the whole."""
    made = []
    shapes = folded_layers.block_shape
    monkeypatch.setattr(folded_layers, "block_shape", lambda *a: made.append(shapes(*a)) or made[-1])
    c = case(PROGRAMS["random"], grid=(5, 9))
    whole = check(c)
    assert made == [(2, 45, 3, 80)]
    monkeypatch.setattr(folded_layers, "_BLOCK", 20)
    for summed in (True, False):
        parts = check(case(PROGRAMS["random"], grid=(5, 9)), summed)
        if summed:
            torch.testing.assert_close(parts, whole, atol=2e-3, rtol=2e-3)
    assert [s[1] for s in made[1:4]] == [20, 20, 5]


def test_strided_rows():
    c = case(PROGRAMS["full"])
    exact = check(c)
    c.x = torch.nn.functional.pad(c.x, (0, 3))[..., : c.x.shape[2]]
    assert torch.equal(check(c), exact)


def test_a_row_with_nan_and_a_row_without_a_finite_logit():
    c = case(PROGRAMS["full"])
    fold = fold_text(c.prepared, c.key, c.value, True, True, 0.2)
    bias = torch.zeros(2, 1, 45, 77, device=DEVICE)
    bias[0, :, 4] = -math.inf
    c.x[1, 7, 3] = math.nan
    y, _ = call_folded(c.prepared, c.x, fold, bias=bias)
    assert (y[0, 4] == 0).all()
    bad = y.isnan().any(-1)
    assert bad.sum() == 1 and y[1, 7].isnan().all()


def test_an_amplifying_gate_fits_half_precision():
    gate = torch.full((2, 77), 1e4, device=DEVICE)
    c = case(Program(), gate=gate)
    c.value *= 1e-4
    check(c)


def test_no_pixel():
    c = case(Program())
    fold = fold_text(c.prepared, c.key, c.value, True, True, 1.0)
    y, _ = call_folded(c.prepared, c.x[:, :0], fold)
    assert y.shape == (2, 0, 24)


def test_what_is_refused_is_said():
    c = case(PROGRAMS["full"])
    assert "float32" in fold_refusal(c.prepared, c.x.float())
    assert "meta" in fold_refusal(c.prepared, c.x.to("meta"))
    captures = prepare(
        Program(), batch=2, heads_count=3, tokens=77, device=DEVICE, capture=Capture((1,)), backend="triton"
    )
    assert "maps are captured" in fold_refusal(captures, c.x)


def test_a_patched_layer_is_as_good_as_stock():
    """The whole layer in half precision, `to_q` and `to_out` folded, against float64, beside diffusers' own."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    from sdattn_fast import SemanticAttnProcessor

    errors = {"stock": 0.0, "ours": 0.0}
    for i in range(4):
        torch.manual_seed(i)
        attn = Attention(48, 20, heads=3, dim_head=16).eval().requires_grad_(False).half().to(DEVICE)
        x, text = torch.randn(2, 45, 48).half().to(DEVICE), torch.randn(2, 77, 20).half().to(DEVICE)
        stock = AttnProcessor2_0()(attn, x, text)
        ours = SemanticAttnProcessor(fold="always", backend="triton")(attn, x, text)
        exact = AttnProcessor2_0()(attn.double(), x.double(), text.double())
        errors["stock"] += float((stock - exact).square().mean())
        errors["ours"] += float((ours - exact).square().mean())
    assert 0 < errors["ours"] <= 1.5**2 * errors["stock"]
