"""The rows kernels against the definition in float64. Not collected by itself: tests/kernels/test_interpreted_*.py and
tests/backend/test_cuda.py run it in processes of their own, under Triton's interpreter and on an emulated machine, and
benchmarks/on_gpu.sh runs it for both backends on a GPU.

A rounding error flips a near-tie, so there are two comparisons: given the kernel's own selection, the results agree
with float64; and the selection is float64's, except where its margin is under the rounding error.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chosen_cases import ALL, pairwise
from poison import poison
from tested_backend import DEVICE, EMULATED, INTERPRETED, NAME, backend, emulated_cuda

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.backend import results
from sdattn_fast.backend.triton.tiles import choose_tiles
from sdattn_fast.plan import TokenSide, make_plan
from sdattn_fast.reference import _gate, _phrase_mean, _renormalise, _softmax, philox_uniform, reference_attention

WHOLE = ALL or not INTERPRETED
NEAR = 2e-5  # relative: a margin that float32 may lose
# Three TF32 products are not quite a float32 one.
EPS = {torch.float32: 1e-6 if INTERPRETED else 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def case(b=2, h=2, m=33, n=77, d=40, dv=None, dtype=torch.float32, content=12, active=None, seed=0, spread=2.0, **side):
    """Inputs and the token side of a call. content: how many tokens after the first are; None: no token classes."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    q, k, v = randn(b, h, m, d) * spread, randn(b, h, n, d), randn(b, h, n, d if dv is None else dv)
    protected = None
    if content is not None:
        protected = torch.ones(b, n, dtype=torch.bool)
        protected[:, 1 : 1 + content] = False
        protected[b - 1, 2 : 2 + content // 2] = True  # entries differ
    tensors = {"protected": protected, "active": active, **side}
    tensors = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    return SimpleNamespace(q=q, k=k, v=v, side=TokenSide(b, h, n, DEVICE, **tensors))


def unpack(bits, n):
    shift = torch.arange(32, device=bits.device)
    kept = (bits[..., None] >> shift) & 1
    assert not kept.flatten(-2)[..., n:].any(), "bits beyond the last token"
    return kept.flatten(-2)[..., :n].bool()


def definition(c, program, bias, scale, kept, capture):
    """Steps 1 to 6 and 8 in float64 with a selection that is given; also the ranks that selection is made from."""
    side, b, n = c.side, c.q.shape[0], c.k.shape[2]
    logits = c.q.double() @ c.k.double().transpose(-1, -2) * scale
    logits = logits if bias is None else logits + bias.double()
    plain = _softmax(logits)
    content = torch.ones(b, n, dtype=torch.bool, device=DEVICE) if side.protected is None else ~side.protected
    on = torch.ones(b, dtype=torch.bool, device=DEVICE) if side.active is None else side.active
    heads = torch.ones(side.heads_count, dtype=torch.bool, device=DEVICE) if side.heads is None else side.heads
    mask = content[:, None, None, :]
    mass = torch.where(mask, plain, 0.0).sum(-1, keepdim=True)
    p = plain if side.gate is None else _gate(plain, mask, side.gate)
    p = p if side.phrases is None else _phrase_mean(p, content, side.phrases)
    ranked = p
    p = _renormalise(p.masked_fill(mask & ~kept, 0.0), mask, mass, program.renormalize)
    where = (on[:, None] & heads)[:, :, None, None]
    p = torch.where(where, p, plain)
    if side.inactive_heads == "zero":
        p, plain = (x * heads[:, None, None] for x in (p, plain))
    maps = None
    if capture is not None:
        tokens = list(range(n) if capture.tokens is None else capture.tokens)
        maps = (p if capture.stage == "final" else plain)[..., tokens].transpose(-1, -2)
        if capture.reduce == "mean":
            maps = maps[:, heads].sum(1) / max(1, int(heads.sum()))
    return p @ c.v.double(), maps, ranked, mask.expand_as(p) & where, where


def selection(ranked, mask, program, seed):
    """float64's choice from the ranks, and where rounding may decide otherwise."""
    unsure = torch.zeros_like(mask)
    gone = torch.zeros_like(mask)
    x = ranked.masked_fill(~mask, -math.inf)
    dropout, refine = program.dropout, program.refine
    if dropout is not None and dropout.mode == "random":
        gone = mask & (philox_uniform(seed, ranked.shape, ranked.device) < dropout.ratio)
    elif dropout is not None and x.numel():
        k = torch.floor(dropout.ratio * mask.sum(-1, keepdim=True).double() + 1e-9).long()
        kth = x.sort(-1, descending=True).values.gather(-1, (k - 1).clamp(min=0))
        gone = mask & (k > 0) & (x >= kth * (1 - 1e-10))
        near = mask & (k > 0) & ((x >= kth * (1 - NEAR)) & ~gone | (kth < 1e-30))
        unsure |= near.any(-1, keepdim=True)
    if refine is not None and refine.threshold is not None and x.numel():
        left = torch.where(mask & ~gone, ranked, 0.0)
        bar = refine.threshold * left.amax(-1, keepdim=True)
        unsure |= mask & ~gone & ((left - bar).abs() <= NEAR * bar + 1e-37)
        gone |= mask & (left <= bar)
    return ~gone, unsure


def check(c, program=Program(), bias=None, scale=None, capture=None, seed=5):
    dtype, d = c.q.dtype, c.q.shape[3]
    scale = d**-0.5 if scale is None else scale
    seed = seed + torch.arange(c.q.shape[0], device=DEVICE)
    side = SimpleNamespace(**{**c.side.__dict__, "seed": seed})
    plan = make_plan(program, TokenSide(**side.__dict__), capture)
    value = c.v
    assert not backend.not_supported_reasons(c.q, c.k, value, bias, plan, False)
    if plan.folded:
        from sdattn_fast.plan import fold_into_value

        value = fold_into_value(value, c.side)
    out, maps, bits = backend.attention(c.q, c.k, value, bias, scale, plan.rows, return_bits=True)
    assert out.dtype == dtype and out.shape == (*c.q.shape[:3], c.v.shape[3])
    kept = unpack(bits, c.k.shape[2])
    if c.side.inactive_heads == "zero" and c.side.heads is not None:
        assert not kept[:, ~c.side.heads].any()
        kept = kept | ~c.side.heads[:, None, None]

    exact, exact_maps, ranked, mask, _ = definition(c, program, bias, scale, kept, capture)
    # Amplifying gates amplify the rounding too.
    tall = 1.0 + exact.abs().amax().item() if exact.numel() else 1.0
    error = (out.double() - exact).abs()
    assert not error.numel() or error.max() <= 4 * EPS[dtype] * tall, f"out is off by {error.max():.3g}"
    if capture is None:
        assert maps is None
    else:
        assert maps.dtype == torch.float32 and maps.shape == exact_maps.shape
        assert not maps.numel() or (maps.double() - exact_maps).abs().max() <= 1e-5 * (1 + exact_maps.max())

    wanted, unsure = selection(ranked, mask, program, seed)
    assert torch.equal(kept | unsure | ~mask, wanted | unsure | ~mask), "another selection than float64's"
    assert kept[~mask].all()
    rows = unsure.any(-1)
    assert rows.sum() <= 0.1 * rows.numel() + 2, "too many near-ties for the test to mean anything"
    if NAME == "cuda":
        # Without bits and maps another kernel serves the call.
        alone, _, _ = backend.attention(c.q, c.k, value, bias, scale, replace(plan.rows, capture_tokens=None))
        error = (alone.double() - exact).abs()[~rows]
        assert not error.numel() or error.max() <= 4 * EPS[dtype] * tall, f"alone, out is off by {error.max():.3g}"
    return out, maps, kept


FULL = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0), "content")


@pytest.mark.parametrize("m", [1, 33, 100])
@pytest.mark.parametrize("n", [1, 7, 77])
def test_plain_attention_of_odd_sizes(m, n):
    check(case(m=m, n=n, d=24, dv=33, content=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("d", [8, 33, 40, 64, 80, 160, 256])
def test_head_dimensions(d, dtype):
    check(case(b=2, h=1, d=d, dtype=dtype), FULL)


@pytest.mark.parametrize("n", [2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 76, 78, 80, 81, 96, 97, 129, 255])
def test_numbers_of_tokens(n):
    """On both sides of every tile's edge."""
    check(case(b=2, h=1, m=17, n=n, d=16, content=n // 2, dtype=torch.float16), Program(SalienceDropout(0.2)))


@pytest.mark.parametrize("n,content", [(154, 20), (154, None), (256, 40), (256, None), (130, 129)])
@pytest.mark.parametrize("d", [40, 256])
def test_many_tokens(n, content, d):
    check(case(b=2, h=1, m=20, n=n, d=d, content=content), FULL)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bfloat16 products are wrong (triton #11584)")
@pytest.mark.parametrize("d", [40, 64, 80, 160])
def test_bfloat16(d):
    check(case(d=d, dtype=torch.bfloat16), FULL)


@pytest.mark.parametrize(
    "ratio, content, dtype",
    pairwise(
        [0.0, 0.09, 0.17, 0.3, 0.6, 0.8, 1.0],
        [12, 30, None],
        [torch.float32, torch.float16],
        whole=WHOLE,
    ),
)
def test_dropout_of_any_k(ratio, content, dtype):
    """k of 0 to 77 passes through every way of selecting."""
    check(case(b=2, h=1, m=20, content=content, dtype=dtype), Program(SalienceDropout(ratio)))


@pytest.mark.parametrize(
    "renormalize, threshold, dropout",
    pairwise(
        ["none", "content", "row"], [None, 0.0, 0.7, 0.99],
        [None, SalienceDropout(0.2), SalienceDropout(0.4, mode="random")], whole=WHOLE,
    ),
)  # fmt: skip
def test_every_program(renormalize, threshold, dropout):
    check(case(h=1, m=20, d=16), Program(dropout, Refinement(1, threshold, 0.0), renormalize))


def test_without_token_classes_half_precision_keeps_what_little_a_row_has_left():
    """BOS takes 0.9999 of the mass and is dropped: what remains is below half precision until it is renormalised."""
    c = case(h=1, d=16, content=None, dtype=torch.float16)
    c.k[:, :, 0] = 0
    c.q[..., 0], c.k[..., 0] = 4.0, 0.0
    c.k[:, :, 0, 0] = 16.0
    check(c, Program(SalienceDropout(1 / 77), renormalize="row"))


def test_a_gate_that_amplifies_an_even_row_does_not_overflow_half_precision():
    gate = torch.ones(2, 1, 77)
    gate[:, :, 5] = 3e5
    c = case(h=1, d=16, gate=gate, dtype=torch.float16)
    c.q.mul_(0.01)
    out, _, _ = check(c, Program(refine=Refinement(1, 0.0, 0.0)))
    assert out.isfinite().all() and out.abs().max() > 1000


@pytest.mark.parametrize("gate_heads", [1, 2])
@pytest.mark.parametrize("program", [Program(), FULL, Program(renormalize="content"), Program(renormalize="row")])
def test_gates_and_phrases(gate_heads, program):
    gate = torch.rand(2, gate_heads, 77) * 2
    gate[:, :, 3] = 0.0
    phrases = torch.full((2, 77), -1)
    phrases[:, 2:5], phrases[:, 7], phrases[0, 8], phrases[:, 0] = 9, 4, 4, 9
    c = case(gate=gate, phrases=phrases, dtype=torch.float32)
    check(c, program)
    check(c, program, capture=Capture(tokens=(3, 0, 60)))


def test_phrases_over_many_content_tokens():
    phrases = torch.arange(77).repeat(2, 1) // 9
    check(case(content=70, phrases=phrases, m=20), FULL)
    check(case(content=40, phrases=phrases, m=20, dtype=torch.float16), FULL)


def test_phrase_members_tie():
    """The two members of the largest phrase go together although k is 1."""
    phrases = torch.full((2, 77), -1)
    phrases[:, 4:6] = 0
    c = case(phrases=phrases, gate=torch.where(torch.arange(77) == 4, 1e4, 1.0).repeat(2, 1)[:, None], content=10)
    _, _, kept = check(c, Program(SalienceDropout(0.1)))
    assert not kept[0, :, :, 4:6].any() and (kept[0].sum(-1) == 75).all()


@pytest.mark.parametrize(
    "inactive_heads, reduce, stage",
    pairwise(["plain", "zero"], ["mean", "mean of the kernel", "none"], ["softmax", "final"], whole=WHOLE),
)
def test_heads_entries_and_capture(inactive_heads, reduce, stage, monkeypatch):
    if reduce == "mean of the kernel":  # as of maps that are large by head
        reduce = "mean"
        monkeypatch.setattr(results, "BY_HEAD_BYTES", 0)
    c = case(
        b=3, h=3, m=20, d=16, active=torch.tensor([True, False, True]), heads=torch.tensor([True, False, True]),
        inactive_heads=inactive_heads,
    )  # fmt: skip
    for tokens in (None, (76, 2, 0)):
        check(c, FULL, capture=Capture(tokens, stage, reduce))


@pytest.mark.parametrize("by_head", [0, 2**24])
def test_no_active_head_captures_zeros(by_head, monkeypatch):
    monkeypatch.setattr(results, "BY_HEAD_BYTES", by_head)
    c = case(heads=torch.tensor([False, False]))
    _, maps, _ = check(c, FULL, capture=Capture((1, 2)))
    assert (maps == 0).all()


@pytest.mark.parametrize("shape", [(2, 2, 33, 77), (1, 1, 1, 77), (2, 1, 1, 77), (77,), (33, 77), (1, 2, 33, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_bias(shape, dtype):
    bias = torch.randn(shape).to(dtype).to(DEVICE)
    bias.view(-1)[::5] = -math.inf
    if shape == (1, 2, 33, 1):
        bias = bias.nan_to_num(neginf=-2.0)
    check(case(h=2, d=16), FULL, bias=bias, scale=0.3)


def test_rows_without_a_finite_logit_and_rows_with_nan():
    c = case(d=16)
    bias = torch.zeros(2, 2, 33, 77, device=DEVICE)
    bias[0, 1, 4] = -math.inf
    c.q[1, 0, 7, 3] = math.nan
    side, v = c.side, c.v
    for program in (Program(), FULL, Program(SalienceDropout(0.3, mode="random"), renormalize="row")):
        seed = 3 + torch.arange(c.q.shape[0], device=DEVICE)
        plan = make_plan(program, TokenSide(**{**side.__dict__, "seed": seed}))
        out, _, _ = backend.attention(c.q, c.k, v, bias, 0.25, plan.rows)
        assert (out[0, 1, 4] == 0).all()
        bad = out.isnan().any(-1)
        assert bad.sum() == 1 and out[1, 0, 7].isnan().all()


@pytest.mark.parametrize("seed", [0, 12345, 2**62 + 17])
def test_random_bits_are_the_definitions(seed):
    c = case(m=40, d=16)
    check(c, Program(SalienceDropout(0.5, mode="random")), seed=seed)


def test_strided_inputs():
    """The layouts that a UNet's projections give, and rows apart by an odd stride."""
    c = case(h=3, d=40)
    exact, _, _ = check(c, FULL)
    c.q, c.k, c.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (c.q, c.k, c.v))
    assert torch.equal(check(c, FULL)[0], exact)
    c.q, c.k, c.v = (torch.nn.functional.pad(x, (0, 3))[..., :40] for x in (c.q, c.k, c.v))
    # In CUDA another kernel's, which adds up in another order.
    near = dict(rtol=1e-5, atol=1e-6) if NAME == "cuda" else dict(rtol=0, atol=0)
    torch.testing.assert_close(check(c, FULL)[0], exact, **near)
    c.k, c.v = (x[:1].expand(2, -1, -1, -1) for x in (c.k, c.v))
    check(c, FULL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", ["qkv"] if INTERPRETED else ["q", "k", "v", "qkv"])  # there addresses mean nothing
def test_inputs_that_start_anywhere(which, dtype):
    """One element past an aligned address, or rows an odd stride apart: nothing may be read 16 bytes at a time."""
    exact, _, _ = check(case(h=2, d=40, m=20, dtype=dtype), FULL)
    c, moved = (case(h=2, d=40, m=20, dtype=dtype) for _ in range(2))
    for name in which:
        x = getattr(c, name)
        setattr(c, name, torch.cat((x.new_full((1,), math.nan), x.flatten()))[1:].view(x.shape))
        wide = torch.nn.functional.pad(x, (0, 1), value=math.nan)
        setattr(moved, name, wide[..., :40])
    for odd in (c, moved):
        assert getattr(odd, which[0]).data_ptr() % 16 or getattr(odd, which[0]).stride(2) == 41
        torch.testing.assert_close(check(odd, FULL)[0], exact, rtol=1e-3, atol=2 * EPS[dtype])


def test_out_can_keep_the_querys_layout():
    c = case(h=3, d=40)
    rows = make_plan(FULL, c.side).rows
    exact, _, _ = backend.attention(c.q, c.k, c.v, None, 0.2, rows)
    beside = c.q.transpose(1, 2).contiguous().transpose(1, 2)
    out, _, _ = backend.attention(beside, c.k, c.v, None, 0.2, rows, keep_layout=True)
    assert torch.equal(out, exact) and out.transpose(1, 2).is_contiguous()
    assert backend.attention(c.q, c.k, c.v, None, 0.2, rows, keep_layout=True)[0].is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)])
def test_empty_inputs(shape):
    b, h, m, n = shape
    c = case(b=max(b, 1), h=h, m=m, n=n, d=16, content=None)
    if b == 0:
        c.q, c.k, c.v = c.q[:0], c.k[:0], c.v[:0]
        c.side = TokenSide(0, h, n, DEVICE)
    plan = make_plan(FULL, c.side, Capture())
    out, maps, bits = backend.attention(c.q, c.k, c.v, None, 1.0, plan.rows, return_bits=True)
    assert out.shape == (b, h, m, 16) and maps.shape == (b, n, m) and bits.shape == (b, h, m, (n + 31) // 32)
    assert (out == 0).all()


@pytest.mark.skipif(NAME == "cuda" and not EMULATED, reason="a device has the multiprocessors that it has")
def test_programs_that_walk_over_tiles_agree(monkeypatch):
    c = case(b=1, h=1, m=700, d=16, content=None)
    once, _, _ = check(c)
    if EMULATED:
        emulated_cuda.emulate(multiprocessors=1)
        walked, _, _ = check(c)
        emulated_cuda.emulate()
    else:
        monkeypatch.setattr(backend.gpu, "num_sms", lambda device: 0)
        choose_tiles.cache_clear()
        walked, _, _ = check(c)
        choose_tiles.cache_clear()
    torch.testing.assert_close(walked, once, rtol=1e-5, atol=1e-6)


def test_same_as_the_reference_end_to_end():
    c = case(b=2, h=2, d=16)
    out, _, _ = check(c, Program(renormalize="row"))
    exact, _ = reference_attention(c.q, c.k, c.v, Program(renormalize="row"), protected=c.side.protected)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capture", [None, Capture((1, 2)), Capture((1, 2), "softmax", "none")], ids=str)
def test_some_heads_with_words(capture):
    heads = torch.tensor([True, False])
    c = case(heads=heads, gate=torch.rand(2, 1, 77) + 0.5, phrases=torch.arange(77).expand(2, -1) // 3)
    check(c, Program(SalienceDropout(0.2), renormalize="content"), capture=capture)
