"""Programs that look over the picture, and the CRF's filter, against the definition. Run as interpreted_rows.py is."""

from __future__ import annotations

import os

import pytest
import torch
from poison import poison

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.backend import triton as backend
from sdattn_fast.functional import semantic_attention
from sdattn_fast.guidance.crf import dense_crf
from sdattn_fast.reference import reference_attention

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SPACE, ROUNDS = SalienceDropout(0.2, "space"), Refinement(3, 0.4, 0.8)
PROGRAMS = {
    "drop": Program(SPACE),
    "drop all": Program(SalienceDropout(1.0, "space"), None, "content"),
    "both": Program(SPACE, Refinement(1, 0.3, 0.8, "space"), "row"),
    "tokens and space": Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0, "space"), "content"),
    "rounds": Program(SPACE, ROUNDS, "content"),
    "rounds of rows": Program(SalienceDropout(0.2), Refinement(2, 0.4, 0.8), "row"),
    "rounds over space": Program(SalienceDropout(0.3, mode="random"), Refinement(2, 0.3, 1.2, "space"), "none"),
}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def inputs(b, h, m, n, d, dv, dtype):
    query, key, value = (torch.randn(b, h, s, c) for s, c in ((m, d), (n, d), (n, dv)))
    side = {
        "gate": torch.rand(b, h, n) + 0.3, "phrases": torch.randint(-3, 3, (b, n)).clamp(min=-1),
        "protected": torch.rand(b, n) > 0.6, "active": torch.arange(b) % 2 == 0, "heads": torch.arange(h) != 1,
    }  # fmt: skip
    tensors = [x.to(dtype).to(DEVICE) for x in (2 * query, key, value)]
    return tensors, {name: x.to(DEVICE) for name, x in side.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_definition(name, dtype, unsure_rows):
    number = list(PROGRAMS).index(name)
    n, d, dv = ((12, 8, 5), (77, 20, 40), (33, 40, 16))[number % 3]
    (query, key, value), side = inputs(2, 2, 35, n, d, dv, dtype)
    capture = (Capture((3, 0)), Capture((3, 0), "softmax"), Capture((3, 0), reduce="none"), None)[number % 4]
    how = {"grid": (5, 7), "seed": 3, "inactive_heads": ("plain", "zero")[number % 2], **side}
    bias = torch.randn(1, 1, 35, n, device=DEVICE) if number % 3 == 0 else None
    got = semantic_attention(query, key, value, PROGRAMS[name], **how, capture=capture, bias=bias, backend="triton")
    doubles = [x.double() for x in (query, key, value)]
    want, maps = reference_attention(*doubles, PROGRAMS[name], **how, capture=capture, bias=bias)
    near = 5e-5
    unsure = unsure_rows(
        *(x.cpu() for x in doubles[:2]), PROGRAMS[name], near,
        **{k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in how.items()},
        bias=None if bias is None else bias.cpu(),
    ).to(DEVICE)  # fmt: skip
    assert unsure.float().mean() < (0.3 if PROGRAMS[name].refine is None or PROGRAMS[name].refine.steps == 1 else 1)
    got, got_maps = (got, None) if capture is None else got
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    assert not got.isnan().any()
    torch.testing.assert_close(got.double()[~unsure], want.double()[~unsure], atol=tolerance, rtol=tolerance)
    if capture is not None:
        sure = (~unsure[:, :, None] if maps.dim() == 4 else ~unsure.any(1)[:, None]).expand(maps.shape)
        torch.testing.assert_close(got_maps[sure], maps[sure].float(), atol=1e-5, rtol=1e-3)


def test_ties_go_together():
    """Small integers, whose products are exact in any order."""
    query = torch.randint(-2, 3, (1, 1, 2, 8), device=DEVICE).float().repeat(1, 1, 20, 1)
    key = torch.randint(-2, 3, (1, 1, 5, 8), device=DEVICE).float()
    value = torch.randn(1, 1, 5, 4, device=DEVICE)
    program = Program(SalienceDropout(0.05, "space"))
    out = semantic_attention(query, key, value, program, scale=0.25, backend="triton")
    want, _ = reference_attention(query.double(), key.double(), value.double(), program, scale=0.25)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert (semantic_attention(0 * query, key, value, program, backend="triton") == 0).all()


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("renormalize", ["content", "row"])
def test_what_is_left_may_be_next_to_nothing(renormalize, rounds):
    """The first token has all but exp(-spread), and step 4 takes it."""
    refine = Refinement(2, 0.0, 0.5) if rounds == 2 else None
    program = Program(SalienceDropout(0.2), refine, renormalize)
    query, key, value = torch.randn(1, 1, 20, 16), torch.zeros(1, 1, 6, 16), torch.randn(1, 1, 6, 16)
    for spread in (60.0, 80.0, 95.0):
        bias = torch.tensor([0.0, *(-spread - 0.5 * i for i in range(5))]).expand(1, 1, 20, 6)
        want, _ = reference_attention(
            query.double(), key.double(), value.double(), program, bias=bias.double(), grid=(4, 5)
        )
        on_device = [x.to(DEVICE) for x in (query, key, value)]
        out = semantic_attention(*on_device, program, bias=bias.to(DEVICE), grid=(4, 5), backend="triton")
        torch.testing.assert_close(out.double().cpu(), want, rtol=1e-4, atol=1e-5)


def test_empty():
    for shape in ((0, 2, 4, 3), (2, 0, 4, 3), (2, 2, 0, 3), (2, 2, 4, 0)):
        b, h, m, n = shape
        query, key, value = (torch.randn(b, h, s, 8, device=DEVICE) for s in (m, n, n))
        program = Program(SPACE, Refinement(2, 0.5, 0.8, "space"))
        out, maps = semantic_attention(
            query, key, value, program, grid=(m // 2, 2), capture=Capture(), backend="triton"
        )
        assert out.shape == (b, h, m, 8) and maps.shape == (b, n, m) and not out.isnan().any()


@pytest.mark.parametrize("pixels, d, labels", [(1, 1, 1), (63, 5, 21), (130, 8, 32), (64, 2, 5)])
def test_gaussian_sums(pixels, d, labels):
    features, values = torch.randn(pixels, d, device=DEVICE) * 2 + 100, torch.randn(pixels, labels, device=DEVICE)
    got = backend.gaussian_attention(features, values)
    f = features.double()
    want = torch.exp(-0.5 * (f[:, None] - f).square().sum(-1)) @ values.double()
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


def test_dense_crf():
    unary, image = torch.randn(3, 7, 9, device=DEVICE), torch.randint(0, 255, (7, 9, 3), device=DEVICE)
    got = dense_crf(unary, image, backend="triton")
    torch.testing.assert_close(got.double(), dense_crf(unary.double(), image), atol=1e-5, rtol=1e-4)
