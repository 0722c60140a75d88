"""Programs that look over the picture, on the CPU kernel, against the definition, for every instruction set.

A rounding error flips a near-tie, and what was decided otherwise spreads with the next smoothing. So the fixture
`unsure_rows` follows, in float64, which rows hang on a comparison too close for float32; the others agree with the
definition, and there must be many.
"""

from __future__ import annotations

import itertools

import numpy
import pytest
import scipy.ndimage
import torch

from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast.backend import cpu
from sdattn_fast.plan import TokenSide, make_plan
from sdattn_fast.reference import reference_attention

pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))

DROPS = {
    "": None,
    "token": SalienceDropout(0.2),
    "space": SalienceDropout(0.2, "space"),
    "all of space": SalienceDropout(1.0, "space"),
    "less than one": SalienceDropout(0.001, "space"),
    "random": SalienceDropout(0.3, "space", "random"),
}
REFINES = {
    "": None,
    "space": Refinement(1, 0.4, 0.0, "space"),
    "space smoothed": Refinement(1, 0.4, 0.8, "space"),
    "twice": Refinement(2, 0.5, 0.8),
    "twice on space, not smoothed": Refinement(2, 0.4, 0.0, "space"),
    "3 on space": Refinement(3, 0.4, 0.8, "space"),
    "8": Refinement(8, 0.3, 2.0),
    "3, wider than the picture": Refinement(3, 0.5, 4.0),
    "not suppressed": Refinement(3, None, 1.0),
}
GRIDS = [(9, 13), (1, 5), (16, 16), (5, 1), (1, 1)]


@pytest.fixture(params=cpu.info().get("isas", []))
def isa(request):
    before = cpu.info()["isa"]
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the backend allocates is full of NaN, so that nothing left unwritten passes for a result."""
    empty = torch.empty

    def poison(*size, **how):
        x = empty(*size, **how)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(0x5A5A5A5A)

    monkeypatch.setattr(cpu.torch, "empty", poison)


def inputs(b, h, m, n, d, dv, dtype=torch.float32, seed=0):
    """query, key, value, and a token side with everything in it: every second entry is off, and a head."""
    make = torch.Generator().manual_seed(seed + m + 7 * n)
    query, key, value = (
        torch.randn(shape, generator=make).mul(by).to(dtype)
        for shape, by in (((b, h, m, d), 2), ((b, h, n, d), 1), ((b, h, n, dv), 1))
    )
    protected = torch.rand(b, n, generator=make) > 0.5
    phrases = torch.randint(-3, 3, (b, n), generator=make).clamp(min=-1)
    side = {
        "gate": torch.rand(b, h, n, generator=make) + 0.3, "phrases": phrases, "protected": protected,
        "active": torch.arange(b) % 2 == 0, "heads": torch.arange(h) != 1,
    }  # fmt: skip
    return query, key, value, side


def check(unsure_rows, query, key, value, side, program, grid, capture=None, most_unsure=0.4, bias=None, **how):
    got = semantic_attention(
        query, key, value, program, **side, **how, grid=grid, seed=3, capture=capture, bias=bias, backend="cpu"
    )
    given = {**side, **how, "grid": grid, "seed": 3}
    doubles = [x.double() for x in (query, key, value)]
    want, maps = reference_attention(*doubles, program, **given, capture=capture, bias=bias)
    unsure = unsure_rows(*doubles[:2], program, **given, bias=bias)
    assert unsure.float().mean() <= most_unsure, f"{unsure.float().mean():.3f} of the rows hang on a near-tie"
    got, got_maps = (got, None) if capture is None else got
    scale = float(want.abs().max()) + 1e-6
    error = (got.double() - want).abs().amax(-1) / scale
    tolerance = 1e-5 if query.dtype == torch.float32 else 2e-2
    assert not got.isnan().any()
    sure = error[~unsure]
    assert sure.numel() == 0 or float(sure.max()) <= tolerance, float(sure.max())
    if maps is not None:
        sure = (~unsure[:, :, None] if maps.dim() == 4 else ~unsure.any(1)[:, None]).expand(maps.shape)
        torch.testing.assert_close(got_maps[sure], maps[sure].float(), rtol=1e-4, atol=tolerance / 2)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("refine", REFINES)
@pytest.mark.parametrize("drop", DROPS)
def test_the_definition(drop, refine, dtype, isa, unsure_rows):
    turn = list(DROPS).index(drop) + list(REFINES).index(refine)
    for i, grid in enumerate(GRIDS):
        program = Program(DROPS[drop], REFINES[refine], ("none", "content", "row")[(i + turn) % 3])
        n, d, dv = ((7, 8, 5), (33, 20, 16), (12, 9, 40))[i % 3]
        query, key, value, side = inputs(2, 3, grid[0] * grid[1], n, d, dv, dtype, seed=i)
        capture = Capture((3, 0), *(("final", "mean"), ("softmax", "mean"), ("final", "none"))[i % 3])
        inactive_heads = ("plain", "zero")[i % 2]
        # Where rounds follow rounds, one near-tie may reach over the whole of a small picture.
        most = 0.1 if REFINES[refine] is None or REFINES[refine].steps == 1 else 1.0
        check(unsure_rows, query, key, value, side, program, grid, capture, most, inactive_heads=inactive_heads)


def test_few_rows_are_unsure(unsure_rows):
    """The comparison above means something: over all its cases most rows are compared."""
    shares = []
    for i, (refine, drop) in enumerate(itertools.product(REFINES.values(), DROPS.values())):
        query, key, _, side = inputs(2, 3, 117, 12, 8, 8, torch.float64, seed=i)
        shares.append(unsure_rows(query, key, Program(drop, refine, "content"), **side, grid=(9, 13)).float().mean())
    assert torch.stack(shares).mean() < 0.2


def test_scipy_and_numpy_say_the_same(isa):
    """Three rounds spelled out without the reference."""
    height, width, n = 12, 17, 6
    query, key, value = (torch.randn(1, 1, s, 8) for s in (height * width, n, n))
    program = Program(SalienceDropout(0.1, "space"), Refinement(3, 0.3, 0.9, "space"), "row")
    logits = query[0, 0].double().numpy() @ key[0, 0].double().numpy().T / 8**0.5
    p = numpy.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    k = int(0.1 * height * width)
    p[p >= numpy.sort(p, 0)[-k]] = 0
    for _ in range(3):
        p[p <= 0.3 * p.max(0)] = 0
        p /= numpy.where(p.sum(1, keepdims=True) == 0, 1, p.sum(1, keepdims=True))
        p = scipy.ndimage.gaussian_filter(p.reshape(height, width, n), (0.9, 0.9, 0)).reshape(-1, n)
    out = semantic_attention(query, key, value, program, grid=(height, width), backend="cpu")
    torch.testing.assert_close(out[0, 0].double(), torch.from_numpy(p) @ value[0, 0].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_map_too_large_to_keep(dtype, isa, unsure_rows):
    """65 * 64 pixels of 256 tokens: every pass computes the logits again."""
    query, key, value, _ = inputs(1, 1, 65 * 64, 256, 8, 8, dtype)
    program = Program(SalienceDropout(0.2, "space"), Refinement(1, 0.3, 0.0, "space"), "content")
    check(unsure_rows, query, key, value, {}, program, None, Capture((9,)), 0.3)


@pytest.mark.parametrize("bias_shape", [(1, 1, 1, 20), (2, 3, 63, 20), (1, 1, 63, 1)], ids=str)
def test_bias(bias_shape, isa, unsure_rows):
    query, key, value, side = inputs(2, 3, 63, 20, 16, 16)
    program = Program(SalienceDropout(0.2, "space"), Refinement(2, 0.3, 0.8), "content")
    check(unsure_rows, query, key, value, side, program, (9, 7), bias=torch.randn(bias_shape), most_unsure=1.0)


def test_ties_go_together(isa):
    """Every second pixel is the same: the k-th largest of a map ties with half of it."""
    query = torch.randn(1, 1, 2, 8).repeat(1, 1, 20, 1)
    key, value = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 4)
    out = semantic_attention(query, key, value, Program(SalienceDropout(0.05, "space")), backend="cpu")
    want, _ = reference_attention(query.double(), key.double(), value.double(), Program(SalienceDropout(0.05, "space")))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    flat = semantic_attention(0 * query, key, value, Program(SalienceDropout(0.05, "space")), backend="cpu")
    assert (flat == 0).all()


@pytest.mark.parametrize("program", [
    Program(SalienceDropout(0.2, "space"), Refinement(1, 0.3, 0.0, "space"), "content"),
    Program(None, Refinement(2, 0.3, 0.3), "row"),
], ids=["space", "twice"])  # fmt: skip
def test_nan_stays_in_its_map(program, isa):
    query, key, value, _ = inputs(2, 2, 36, 9, 8, 8)
    query[0, 1, 17, 3] = float("nan")
    bias = torch.zeros(2, 1, 36, 9)
    bias[1, 0, 4] = -float("inf")
    out = semantic_attention(query, key, value, program, grid=(6, 6), bias=bias, backend="cpu")
    assert out[0, 1, 17].isnan().all()
    assert not out[0, 0].isnan().any() and not out[1].isnan().any()
    if program.refine.sigma == 0:
        assert (out[1, :, 4] == 0).all()


@pytest.mark.parametrize("empty", range(6))
def test_empty(empty, isa):
    shape = [2, 3, 6, 7, 8, 5]
    shape[empty] = 0
    b, h, m, n, d, dv = shape
    query, key, value = torch.randn(b, h, m, d), torch.randn(b, h, n, d), torch.randn(b, h, n, dv)
    program = Program(SalienceDropout(0.5, "space"), Refinement(2, 0.5, 0.8, "space"), "content")
    out, maps = semantic_attention(
        query, key, value, program, grid=(m // 3, 3), capture=Capture(), backend="cpu", scale=1.0
    )
    assert out.shape == (b, h, m, dv) and maps.shape == (b, n, m)
    assert not out.isnan().any() and not maps.isnan().any()


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_threads_and_strides_change_nothing(reduce, isa):
    query, key, value, side = inputs(2, 3, 300, 33, 16, 16)
    program = Program(SalienceDropout(0.2, "space"), Refinement(3, 0.3, 0.8), "content")
    plan = make_plan(program, TokenSide(2, 3, 33, query.device, gate=side["gate"]), Capture(reduce=reduce))
    call = (None, 0.25, plan.rows, plan.picture, (15, 20))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, maps = cpu.picture_attention(query, key, value, *call)
        torch.set_num_threads(4)
        again, maps_again = cpu.picture_attention(query, key, value, *call)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, again) and torch.equal(maps, maps_again)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    laid_out, _ = cpu.picture_attention(*swapped, *call, keep_layout=True)
    assert torch.equal(laid_out, out) and laid_out.transpose(1, 2).is_contiguous()
    shared = [x[:1, :1].expand(2, 3, -1, -1) for x in (query, key, value)]
    copied = [x.contiguous() for x in shared]
    assert torch.equal(cpu.picture_attention(*shared, *call)[0], cpu.picture_attention(*copied, *call)[0])


def test_auto_takes_it_and_gradients_go_to_the_reference(recwarn):
    query, key, value, side = inputs(2, 3, 20, 7, 8, 8)
    for program in (Program(SalienceDropout(0.2, "space")), Program(refine=Refinement(3, 0.3, 0.8, "space"))):
        auto = semantic_attention(query, key, value, program, **side, grid=(4, 5))
        assert torch.equal(auto, semantic_attention(query, key, value, program, **side, grid=(4, 5), backend="cpu"))
    assert not [w for w in recwarn if "reference serves" in str(w.message)]
    with pytest.raises(ValueError, match=r"backend: 'cpu' cannot serve this call: .*over the picture"):
        semantic_attention(query.requires_grad_(), key, value, program, grid=(4, 5), backend="cpu")
