"""The CPU kernel against the definition, in two parts, for every instruction set of this machine.

The program decides, and a rounding error flips a near-tie. So: given the kernel's own decisions (its bits), values
agree with float64 within twice the error of plain torch in the inputs' precision; and the decisions are those of
float64 except in rows whose margin is below rounding error, which are counted.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, field

import numpy
import pytest
import scipy.ndimage
import torch
from side_by_side import side_by_side
from torch import Tensor

from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast.backend import cpu
from sdattn_fast.plan import TokenSide, make_plan
from sdattn_fast.reference import philox_uniform, reference_attention

pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))

ISAS = cpu.info().get("isas", [])
DTYPES = [torch.float32, torch.bfloat16]
FULL = Program(SalienceDropout(0.2), Refinement(threshold=0.3, sigma=0), "content")


@dataclass
class Case:
    """B, H, M, N, D, Dv; the program; which parts of the token side and which form of bias to make up."""

    shape: tuple[int, int, int, int, int, int]
    program: Program = FULL
    has: tuple[str, ...] = ()
    bias: str | None = None
    side: dict = field(default_factory=dict)

    def __str__(self) -> str:
        p = self.program
        drop = "" if p.dropout is None else f"{p.dropout.mode}{p.dropout.ratio}"
        nms = "" if p.refine is None else f"nms{p.refine.threshold}"
        words = ["x".join(map(str, self.shape)), drop, nms, p.renormalize, *self.has, self.bias, *self.side.values()]
        return "-".join(str(w) for w in words if w)


def _program(ratio=None, threshold=None, renormalize="none", mode="topk"):
    dropout = None if ratio is None else SalienceDropout(ratio, mode=mode)
    refine = None if threshold is None else Refinement(threshold=threshold, sigma=0)
    return Program(dropout, refine, renormalize)


EVERYTHING = ("gate", "phrases", "protected", "active", "heads")
CASES = [
    # Sizes.
    Case((1, 1, 1, 1, 1, 1)),
    Case((1, 2, 33, 7, 8, 8), has=EVERYTHING),
    Case((2, 3, 100, 77, 40, 40), has=EVERYTHING),
    Case((2, 2, 1023, 77, 64, 64), has=("gate", "protected")),
    Case((1, 2, 33, 154, 80, 80), has=EVERYTHING),
    Case((1, 1, 100, 77, 160, 160), has=EVERYTHING),
    Case((1, 1, 33, 256, 256, 256), has=("gate", "protected")),
    Case((1, 2, 17, 31, 13, 29), has=EVERYTHING),
    Case((1, 1, 50, 33, 41, 3), has=("gate",)),
    # No program at all.
    Case((2, 2, 100, 77, 40, 40), Program()),
    Case((2, 2, 100, 77, 40, 40), Program(), has=("heads",), side={"inactive_heads": "zero"}),
    # Renormalisation.
    *(
        Case((1, 2, 65, 77, 40, 40), _program(0.2, 0.5, how), ("gate", "protected"))
        for how in ("none", "content", "row")
    ),
    *(Case((1, 2, 65, 40, 40, 40), _program(None, None, how), ("gate",)) for how in ("content", "row")),
    # Gates.
    Case((2, 3, 64, 77, 40, 40), has=("gate_by_head", "protected")),
    Case((2, 3, 64, 77, 40, 40), has=("hard_gate", "protected")),
    Case((2, 3, 64, 20, 40, 40), _program(0.2, 0.0, "row"), has=("hard_gate",)),
    # Dropout: every way to find the k-th largest.
    *(
        Case((1, 2, 65, 77, 40, 40), _program(r, 0.1, "content"), ("phrases",))
        for r in (0.0, 0.02, 0.05, 0.2, 0.5, 1.0)
    ),
    *(Case((1, 1, 65, n, 16, 16), _program(r, 0.3)) for n in (5, 16, 17, 32, 50, 256) for r in (0.06, 0.2, 0.3, 0.9)),
    *(Case((2, 2, 65, 77, 40, 40), _program(r, 0.1, "row", "random"), ("protected",)) for r in (0.0, 0.3, 1.0)),
    # Suppression.
    *(Case((1, 2, 65, 77, 40, 40), _program(None, t, "content"), ("protected",)) for t in (0.0, 0.3, 0.99)),
    # Heads and bias.
    Case((2, 3, 65, 77, 40, 40), has=EVERYTHING, side={"inactive_heads": "zero"}),
    *(
        Case((2, 3, 65, 77, 40, 40), has=("protected",), bias=b)
        for b in ("column", "batch", "full", "pixel", "row", "turned", "one", "-inf")
    ),
]


@pytest.fixture
def each_isa():
    """Iterates over this machine's instruction sets, each in use in its turn."""
    before = cpu.info()["isa"]

    def one_by_one():
        for name in ISAS:
            cpu.set_isa(name)
            yield name

    yield one_by_one
    cpu.set_isa(before)


@pytest.fixture(params=ISAS)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_decisions(case, dtype, each_isa):
    query, key, value, bias, side = _inputs(case, dtype)
    capture = Capture(tokens=None, stage="final")
    rows = make_plan(case.program, side, capture).rows
    call = (query, key, bias, case.program, side)
    expected, close = _decisions(*call)
    assert close.float().mean() <= 0.05
    n, judged = key.shape[2], None
    for isa in each_isa():
        out, maps, bits = cpu.attention(query, key, value, bias, query.shape[-1] ** -0.5, rows, return_bits=True)
        kept = _unpacked(bits, n)
        assert _tail_is_zero(bits, n), isa
        wrong = ((kept != expected).any(-1) & ~close).sum()
        assert wrong == 0, f"{isa}: {wrong} of {close.numel()} rows decide otherwise without a near-tie"
        if judged is None or not torch.equal(judged, kept):
            judged = kept
            exact, exact_maps = _given(kept, value, *call, torch.float64)
            plain, plain_maps = _given(kept, value, *call, dtype)
        _assert_close(isa, out, exact, plain, dtype)
        _assert_close(isa, maps, exact_maps, plain_maps, torch.float32)


@pytest.mark.parametrize("reduce", ["mean", "none"])
@pytest.mark.parametrize("stage", ["softmax", "final"])
@pytest.mark.parametrize("heads", [None, "some", "none"])
def test_capture(stage, reduce, heads, isa):
    case = Case((2, 3, 70, 77, 40, 40), has=("gate", "protected", "active"), side={"inactive_heads": "zero"})
    query, key, value, _, side = _inputs(case, torch.float32)
    on = {None: None, "some": torch.tensor([True, False, True]), "none": torch.zeros(3, dtype=torch.bool)}[heads]
    side = TokenSide(**{**vars(side), "heads": on})
    capture = Capture(tokens=(5, 76, 0), stage=stage, reduce=reduce)
    program = Program(renormalize="content")
    _, maps, _ = cpu.attention(query, key, value, None, 40**-0.5, make_plan(program, side, capture).rows)
    _, expected = _reference(query, key, value, None, program, side, capture)
    torch.testing.assert_close(maps, expected.to(torch.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, isa):
    case = Case((2, 3, 70, 77, 40, 24), has=EVERYTHING)
    query, key, value, _, side = _inputs(case, dtype)
    rows = make_plan(case.program, side).rows
    expected, _, _ = cpu.attention(query, key, value, None, 0.2, rows)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert torch.equal(cpu.attention(*swapped, None, 0.2, rows)[0], expected)
    laid_out, _, _ = cpu.attention(*swapped, None, 0.2, rows, keep_layout=True)
    assert torch.equal(laid_out, expected) and laid_out.transpose(1, 2).is_contiguous()
    wide = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in (query, key, value)]
    assert torch.equal(cpu.attention(*wide, None, 0.2, rows)[0], expected)
    shared = [x[:1, :1].expand(2, 3, -1, -1) for x in (query, key, value)]
    copied = [x.contiguous() for x in shared]
    assert torch.equal(cpu.attention(*shared, None, 0.2, rows)[0], cpu.attention(*copied, None, 0.2, rows)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", range(6))
def test_empty(empty, dtype, isa):
    shape = [2, 3, 5, 7, 8, 6]
    shape[empty] = 0
    b, h, m, n, d, dv = shape
    query, key, value = (torch.randn(s).to(dtype) for s in ((b, h, m, d), (b, h, n, d), (b, h, n, dv)))
    rows = make_plan(FULL, _side(b, h, n), Capture(tokens=None if n == 0 else (0,))).rows
    out, maps, bits = cpu.attention(query, key, value, None, 1.0, rows, return_bits=True)
    assert out.shape == (b, h, m, dv) and out.dtype == dtype and not out.isnan().any()
    assert maps.shape == (b, min(n, 1), m) and not maps.isnan().any()
    assert bits.shape == (b, h, m, (n + 31) // 32)
    if n == 0:
        assert (out == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("program", [Program(), FULL, _program(1.0, 0.5, "row"), _program(0.2, None, "none")], ids=str)
def test_nan_and_infinity_stay_in_their_row(program, dtype, isa):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 24).to(dtype) for n in (40, 20, 20))
    query[0, 1, 7, 3] = float("nan")
    bias = torch.zeros(1, 1, 40, 20)
    bias[0, 0, 9] = -float("inf")
    bias[0, 0, 11, 4] = float("inf")
    bias[0, 0, 13, 5] = float("nan")
    out, _, _ = cpu.attention(query, key, value, bias, 0.2, make_plan(program, _side(1, 2, 20)).rows)
    spoilt = torch.zeros(1, 2, 40, dtype=torch.bool)
    spoilt[:, :, [11, 13]] = True
    spoilt[0, 1, 7] = True
    assert out[spoilt].isnan().all()
    assert not out[~spoilt].isnan().any()
    assert (out[0, :, 9] == 0).all()


@pytest.mark.parametrize("spread", [60.0, 69.0, 80.0, 88.0, 95.0, 104.0])
@pytest.mark.parametrize("renormalize", ["content", "row"])
def test_what_is_left_may_be_next_to_nothing(renormalize, spread, isa):
    # The first token has all but exp(-spread), and step 4 takes it.
    query, value = torch.randn(1, 1, 20, 8), torch.randn(1, 1, 6, 8)
    bias = torch.tensor([0.0, *(-spread - 0.5 * i for i in range(5))]).expand(1, 1, 20, 6)
    program, key = _program(0.2, None, renormalize), torch.zeros(1, 1, 6, 8)
    want, _ = reference_attention(query.double(), key.double(), value.double(), program, bias=bias.double())
    out, _, _ = cpu.attention(query, key, value, bias, 1.0, make_plan(program, _side(1, 1, 6)).rows)
    same, _ = reference_attention(query, key, value, program, bias=bias)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same.double(), want, rtol=1e-5, atol=1e-6)
    rounds = Program(SalienceDropout(0.2), Refinement(2, 0.0, 0.5), renormalize)
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    for now, backend in ((program, "auto"), (rounds, "cpu"), (rounds, "reference")):
        with torch.set_grad_enabled(backend == "auto"):
            out = semantic_attention(*inputs, now, bias=bias, scale=1.0, grid=(4, 5), backend=backend)
        assert out.isfinite().all()
        if backend == "auto":
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


def test_nan_in_value_spreads_along_its_channel_only(isa):
    query, key, value = (torch.randn(1, 1, n, 24) for n in (40, 20, 20))
    value[0, 0, 3, 5] = float("nan")
    out, _, _ = cpu.attention(query, key, value, None, 0.2, make_plan(Program(), _side(1, 1, 20)).rows)
    assert out[..., 5].isnan().all() and not out[..., :5].isnan().any() and not out[..., 6:].isnan().any()


def test_ties_go_together(isa):
    query, key, value = torch.zeros(1, 1, 5, 8), torch.randn(1, 1, 12, 8), torch.randn(1, 1, 12, 8)
    rows = make_plan(_program(0.25), _side(1, 1, 12)).rows
    _, _, bits = cpu.attention(query, key, value, None, 1.0, rows, return_bits=True)
    assert (bits == 0).all()


def test_random_mode_is_philox(isa):
    b, h, m, n = 2, 3, 70, 20
    query, key, value = (torch.randn(b, h, s, 8) for s in (m, n, n))
    seed = torch.tensor([0x1234_5678_9ABC_DEF0, 7])[:b]
    rows = make_plan(_program(0.4, mode="random"), _side(b, h, n, seed=seed)).rows
    _, _, bits = cpu.attention(query, key, value, None, 1.0, rows, return_bits=True)
    expected = ~(philox_uniform(seed, (b, h, m, n), torch.device("cpu")) < 0.4)
    assert torch.equal(_unpacked(bits, n), expected)


def test_results_do_not_depend_on_threads(isa):
    case = Case((2, 3, 500, 77, 40, 40), has=EVERYTHING)
    query, key, value, _, side = _inputs(case, torch.float32)
    rows = make_plan(FULL, side, Capture()).rows
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.attention(query, key, value, None, 0.2, rows)
        torch.set_num_threads(2)
        two = cpu.attention(query, key, value, None, 0.2, rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_several_python_threads():
    case = Case((2, 4, 300, 77, 40, 40), has=EVERYTHING)
    query, key, value, _, side = _inputs(case, torch.float32)
    rows = make_plan(FULL, side).rows
    expected = cpu.attention(query, key, value, None, 0.2, rows)[0]
    same = []

    def work(_):
        same.extend(torch.equal(cpu.attention(query, key, value, None, 0.2, rows)[0], expected) for _ in range(20))

    side_by_side(work, range(4))
    assert len(same) == 80 and all(same)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_after_fork():
    query, key, value = (numpy.random.default_rng(0).standard_normal((1, 2, n, 8), "float32") for n in (500, 20, 20))
    expected = _plain_sum(query, key, value)  # the parent's pool has threads now
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=lambda: answers.put(_plain_sum(query, key, value)))
    child.start()
    try:
        assert answers.get(timeout=20) == expected
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()


def _plain_sum(*arrays: numpy.ndarray) -> float:
    """Without a torch operation that would start torch's own threads, which hang after fork."""
    tensors = [torch.from_numpy(a) for a in arrays]
    out = cpu.attention(*tensors, None, 0.3, make_plan(Program(), _side(1, 2, 20)).rows)[0]
    return float(out.numpy().astype("float64").sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("grid, sigma, c", [((8, 8), 0.8, 40), ((5, 9), 1.7, 3), ((1, 7), 2.5, 33), ((3, 2), 4.0, 64)])
def test_smooth(grid, sigma, c, times, dtype, isa):
    torch.manual_seed(0)
    x = torch.randn(2, 3, grid[0] * grid[1], c).to(dtype)
    where = torch.tensor([[True, False, True], [False, True, True]])
    expected = x.double().numpy().reshape(2, 3, *grid, c).copy()
    for b, h in where.nonzero().tolist():
        for _ in range(times):
            expected[b, h] = scipy.ndimage.gaussian_filter(expected[b, h], (sigma, sigma, 0))
    got = cpu.smooth(x, grid, sigma, times, where)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        got.double(), torch.from_numpy(expected).reshape(x.shape), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(got[0, 1], x[0, 1])
    everywhere = cpu.smooth(x, grid, sigma, times, None)
    assert torch.equal(everywhere[where], got[where]) and not torch.equal(everywhere[0, 1], x[0, 1])


def test_smooth_of_a_view(isa):
    x = torch.randn(2, 49, 3, 8)
    a = cpu.smooth(x.transpose(1, 2), (7, 7), 1.0, 1, None)
    assert torch.equal(a, cpu.smooth(x.transpose(1, 2).contiguous(), (7, 7), 1.0, 1, None))


def test_reasons_name_what_is_off():
    query, key, value = (torch.randn(1, 1, 8, 300).half() for _ in range(3))
    plan = make_plan(Program(), _side(1, 1, 8))
    reasons = cpu.not_supported_reasons(query, key, value, None, plan, needs_grad=True)
    assert any("float16" in r for r in reasons) and any("300" in r for r in reasons)
    strided = torch.randn(1, 1, 8, 16)[..., ::2]
    assert any("contiguous" in r for r in cpu.not_supported_reasons(strided, strided, strided, None, plan, False))
    good = torch.randn(1, 1, 8, 16)
    assert cpu.not_supported_reasons(good, good, good, None, plan, False) == []


def test_set_isa_refuses_the_unknown():
    with pytest.raises(ValueError, match="portable"):
        cpu.set_isa("abacus")


# Inputs.


def _side(b, h, n, **more) -> TokenSide:
    return TokenSide(batch=b, heads_count=h, tokens=n, device=torch.device("cpu"), **more)


def _inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None, TokenSide]:
    b, h, m, n, d, dv = case.shape
    make = torch.Generator().manual_seed(b + 10 * h + 100 * m + 1000 * n + d)
    rand = lambda *s: torch.rand(*s, generator=make)  # noqa: E731
    randn = lambda *s: torch.randn(*s, generator=make)  # noqa: E731
    query, key, value = randn(b, h, m, d).mul(2).to(dtype), randn(b, h, n, d).to(dtype), randn(b, h, n, dv).to(dtype)
    given = dict(case.side)
    if "gate" in case.has:
        given["gate"] = rand(b, 1, n) * 2
    if "gate_by_head" in case.has:
        given["gate"] = rand(b, h, n) * 3
    if "hard_gate" in case.has:
        given["gate"] = (rand(b, 1, n) > 0.5).float()
    if "phrases" in case.has:
        given["phrases"] = (rand(b, n) * 9).long() - 4
        given["phrases"].clamp_(min=-1)
    if "protected" in case.has:
        given["protected"] = rand(b, n) > 0.4
    if "active" in case.has:
        given["active"] = torch.arange(b) % 2 == b - 1
    if "heads" in case.has:
        given["heads"] = torch.arange(h) % 2 == 0
    given["seed"] = 77 + torch.arange(b)
    shapes = {
        "column": (1, 1, 1, n),
        "batch": (b, 1, 1, n),
        "full": (b, h, m, n),
        "pixel": (1, 1, m, n),
        "row": (1, h, m, 1),
        "turned": (b, 1, n, m),
        "one": (1, 1, 1, 1),
    }
    bias = None
    if case.bias == "-inf":
        bias = torch.where(rand(b, 1, m, n) < 0.3, -float("inf"), 0.0)
    elif case.bias is not None:
        bias = randn(*shapes[case.bias])
        bias = bias.double() if case.bias == "one" else bias.to(dtype)
        bias = bias.transpose(2, 3) if case.bias == "turned" else bias
    return query, key, value, bias, _side(b, h, n, **given)


# The oracle: the definition with its decisions given.


def _reference(query, key, value, bias, program, side, capture=None):
    return reference_attention(
        query.double(), key.double(), value.double(), program, bias=bias, gate=side.gate, phrases=side.phrases,
        protected=side.protected, active=side.active, heads=side.heads, inactive_heads=side.inactive_heads,
        seed=side.seed, capture=capture,
    )  # fmt: skip


def _salience(query, key, bias, side, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """p after step 1, p after step 3, and who is content; phrase members' means are one number, so they tie exactly."""
    high = torch.promote_types(dtype, torch.float32)
    logits = (query.to(dtype) @ key.to(dtype).transpose(-1, -2)).to(high) * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.to(high)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(logits.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    b, n = side.batch, side.tokens
    content = torch.ones(b, n, dtype=torch.bool) if side.protected is None else ~side.protected
    x = p.clone()
    if side.gate is not None:
        x = torch.where(content[:, None, None], x * side.gate.to(high)[:, :, None], x)
    if side.phrases is not None:
        for entry in range(b):
            for phrase in set(side.phrases[entry].tolist()) - {-1}:
                members = content[entry] & (side.phrases[entry] == phrase)
                if members.any():
                    x[entry][..., members] = x[entry][..., members].mean(-1, keepdim=True)
    return p, x, content


def _runs_program(side: TokenSide) -> Tensor:
    active = torch.ones(side.batch, dtype=torch.bool) if side.active is None else side.active
    heads = torch.ones(side.heads_count, dtype=torch.bool) if side.heads is None else side.heads
    return (active[:, None] & heads)[:, :, None, None]


def _given(kept, value, query, key, bias, program, side, dtype) -> tuple[Tensor, Tensor]:
    p, x, content = _salience(query, key, bias, side, dtype)
    c = content[:, None, None].expand_as(x)
    x = torch.where(c & ~kept, 0.0, x)
    if program.renormalize == "row":
        total = x.sum(-1, keepdim=True)
        x = x / torch.where(total == 0, 1.0, total)
    elif program.renormalize == "content":
        before, left = (torch.where(c, y, 0.0).sum(-1, keepdim=True) for y in (p, x))
        x = torch.where(c, x * (before / torch.where(left == 0, 1.0, left)), x)
    x = torch.where(_runs_program(side), x, p)
    heads = torch.ones(side.heads_count) if side.heads is None else side.heads.float()
    if side.inactive_heads == "zero":
        x = x * heads[:, None, None].to(x.dtype)
    weight = (heads / heads.sum().clamp(min=1)).to(x.dtype)
    return x.to(dtype) @ value.to(dtype), torch.einsum("bhmn,h->bnm", x, weight)


def _assert_close(isa: str, got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Twice plain torch's error in the mean square; the largest single one scatters, so four times."""
    assert not got.isnan().any(), isa
    ours, torchs = (got - exact).abs(), (plain - exact).abs()
    floor = torch.finfo(dtype).eps * float(exact.abs().max())
    mean, mean_of_torch = (float(e.square().mean().sqrt()) for e in (ours, torchs))
    assert mean <= max(2 * mean_of_torch, floor), f"{isa}: error {mean:.3g}, plain torch {mean_of_torch:.3g}"
    assert ours.max() <= max(4 * float(torchs.max()), 4 * floor), f"{isa}: {ours.max():.3g}, torch {torchs.max():.3g}"


def _unpacked(bits: Tensor, n: int) -> Tensor:
    place = torch.arange(n)
    return ((bits[..., place // 32] >> (place % 32)) & 1).bool()


def _tail_is_zero(bits: Tensor, n: int) -> bool:
    return n % 32 == 0 or bool((bits[..., -1].long() & 0xFFFFFFFF < 1 << (n % 32)).all())


def _decisions(query, key, bias, program, side) -> tuple[Tensor, Tensor]:
    """What float64 keeps, and the rows (B, H, M) where some comparison is too close for float32 to call."""
    _, x, content = _salience(query, key, bias, side, torch.float64)
    c = content[:, None, None].expand_as(x)
    ranked = x.masked_fill(~c, -1.0)
    keep, close = torch.ones_like(c), torch.zeros(c.shape[:-1], dtype=torch.bool)

    def near(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).abs() <= 2e-5 * torch.maximum(a, b)) & (a != b)

    if program.dropout is not None and program.dropout.mode == "random":
        keep &= ~(philox_uniform(side.seed, x.shape, x.device) < program.dropout.ratio)
    elif program.dropout is not None:
        k = torch.floor(program.dropout.ratio * content.sum(-1).double() + 1e-9).long()[:, None, None, None]
        kth = ranked.sort(-1, descending=True).values.gather(-1, (k - 1).clamp(min=0).expand(*x.shape[:-1], 1))
        keep &= ~((k > 0) & (ranked >= kth))
        close |= ((k > 0) & c & near(ranked, kth)).any(-1)
    if program.refine is not None and program.refine.threshold is not None:
        left = torch.where(c & keep, x, 0.0)
        bound = program.refine.threshold * left.amax(-1, keepdim=True)
        close |= (c & keep & near(x, bound)).any(-1)
        keep &= x > bound
    on = _runs_program(side)
    keep = torch.where(on, keep | ~c, True)
    if side.inactive_heads == "zero" and side.heads is not None:
        keep = keep & side.heads[:, None, None]
    return keep, close & on[..., 0]
