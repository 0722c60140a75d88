"""`semantic_attention` on "auto" against the definition: plans, foldings, smoothing, maps, dispatch, torch.compile."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from old_torch import compiles_whole
from torch import library

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast.functional import prepare
from sdattn_fast.reference import reference_attention

B, H, M, N, D, DV = 2, 3, 12, 9, 8, 6
GRID = (3, 4)


def _qkv(dtype=torch.float32):
    return [torch.randn(B, H, s, c).to(dtype) for s, c in ((M, D), (N, D), (N, DV))]


def _text():
    protected = torch.zeros(B, N, dtype=torch.bool)
    protected[:, [0, 7, 8]] = True
    return {
        "gate": torch.rand(B, N) + 0.2,
        "phrases": torch.tensor([[0, 1, 1, -1, 2, 2, 2, 2, -1]] * B),
        "protected": protected,
        "active": torch.tensor([True, False]),
    }


PROGRAMS = {
    "plain": Program(),
    "smooth": Program(refine=Refinement(1, None, 0.8)),
    "smooth twice": Program(refine=Refinement(2, None, 0.8)),
    "renormalise": Program(renormalize="content"),
    "nms": Program(refine=Refinement(1, 0.5, 0.0)),
    "full": Program(SalienceDropout(0.3), Refinement(1, 0.4, 0.8), "content"),
    "full row": Program(SalienceDropout(0.3), Refinement(1, 0.4, 0.0), "row"),
    "random": Program(SalienceDropout(0.3, mode="random"), Refinement(1, 0.4, 0.8), "content"),
    "space": Program(SalienceDropout(0.3, axis="space"), Refinement(1, 0.4, 0.8, axis="space"), "content"),
    "repeated": Program(SalienceDropout(0.3), Refinement(3, 0.4, 0.8), "content"),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    "capture", [None, Capture((1, 4)), Capture(None, "softmax"), Capture((0, 2), "final", "none")], ids=str
)
@pytest.mark.parametrize("heads", [None, ([0, 2], "plain"), ([1], "zero")], ids=str)
def test_auto_equals_the_definition(name, capture, heads):
    query, key, value = _qkv()
    text, program = _text(), PROGRAMS[name]
    chosen = {} if heads is None else {"heads": heads[0], "inactive_heads": heads[1]}
    got = semantic_attention(query, key, value, program, **text, **chosen, grid=GRID, seed=5, capture=capture)
    if heads is not None:
        chosen["heads"] = torch.tensor([h in heads[0] for h in range(H)])
    want, maps = reference_attention(
        query.double(), key.double(), value.double(), program, **text, **chosen, grid=GRID, seed=5, capture=capture
    )
    if capture is not None:
        got, got_maps = got
        torch.testing.assert_close(got_maps, maps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


def test_linear_steps_fold_into_value():
    text = _text()
    side = {"batch": B, "heads_count": H, "tokens": N, "device": torch.device("cpu")}
    assert prepare(Program(), **side, **text).plan.folded
    assert prepare(Program(), **side, **text).plan.rows.content is None
    assert not prepare(Program(renormalize="content"), **side, **text).plan.folded
    assert not prepare(Program(), **side, **text, capture=Capture()).plan.folded
    assert prepare(Program(), **side, **text, capture=Capture(stage="softmax")).plan.folded
    without_gate = prepare(Program(renormalize="content"), **side, phrases=text["phrases"]).plan
    assert without_gate.folded, "phrases keep the content's mass, so there is nothing to renormalise"


@pytest.mark.parametrize("empty", list(itertools.product([0, 1], repeat=4))[:-1], ids=str)
def test_empty_tensors_give_empty_results(empty):
    b, h, m, n = (
        size * (1 if keep == 0 else keep) if keep else 0 for size, keep in zip((B, H, M, N), empty, strict=True)
    )
    query, key, value = torch.randn(b, h, m, D), torch.randn(b, h, n, D), torch.randn(b, h, n, DV)
    program = Program(SalienceDropout(0.5), Refinement(1, 0.5, 0.0), "content")
    out, maps = semantic_attention(query, key, value, program, capture=Capture())
    assert out.shape == (b, h, m, DV) and maps.shape == (b, n, m)
    if n == 0:
        assert (out == 0).all()


def test_gate_of_bool_equals_its_numbers():
    query, key, value = _qkv()
    gate = torch.rand(B, N) > 0.5
    program = Program(renormalize="content")
    torch.testing.assert_close(
        semantic_attention(query, key, value, program, gate=gate),
        semantic_attention(query, key, value, program, gate=gate.float()),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_seeds_need_not_be_contiguous(backend):
    query, key, value = (torch.randn(2, 2, s, 8) for s in (12, 6, 6))
    program = Program(SalienceDropout(0.4, mode="random"))
    for seeds in (torch.tensor([1, 99, 7, 99])[::2], torch.tensor([4]).expand(2)):
        got = semantic_attention(query, key, value, program, seed=seeds, backend=backend)
        want = semantic_attention(query, key, value, program, seed=seeds.clone().contiguous(), backend=backend)
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"seed: expected one element or \(2,\), one for each entry, got \(3,\)"):
        semantic_attention(query, key, value, program, seed=torch.arange(3), backend=backend)


def test_seed_none_draws_from_torchs_generator():
    query, key, value = _qkv()
    program = Program(SalienceDropout(0.5, mode="random"))
    torch.manual_seed(3)
    first, second = (semantic_attention(query, key, value, program) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(semantic_attention(query, key, value, program), first)
    assert not torch.equal(first, second)


def test_gradients_are_the_references():
    query, key, value = (x.requires_grad_() for x in _qkv())
    program, text = PROGRAMS["full"], _text()
    grads = []
    for backend in ("auto", "reference"):
        out = semantic_attention(query, key, value, program, **text, grid=GRID, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), (query, key, value)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_falling_back_is_said_once_and_refused_by_name():
    query, key, value = (x.double() for x in _qkv())
    sdattn_fast.backend._said.clear()
    with pytest.warns(UserWarning, match="float64"):
        semantic_attention(query, key, value, PROGRAMS["repeated"], grid=GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        semantic_attention(query, key, value, PROGRAMS["repeated"], grid=GRID)
    with pytest.raises(ValueError, match=r"backend: 'cpu' cannot serve this call: .*float64"):
        semantic_attention(query, key, value, PROGRAMS["repeated"], grid=GRID, backend="cpu")


def test_a_named_backend_lists_every_reason():
    query, key, value = torch.randn(1, 1, 4, 300), torch.randn(1, 1, 300, 300), torch.randn(1, 1, 300, 4)
    with pytest.raises(ValueError, match="backend: 'cpu' cannot serve") as error:
        semantic_attention(query, key, value, backend="cpu")
    for word in ("300 tokens", "head dimension 300"):
        assert word in str(error.value)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(semantic_attention(query, key, value), plain)


def test_all_minus_infinity_and_nan_rows():
    query, key, value = _qkv()
    bias = torch.zeros(B, 1, M, N)
    bias[0, 0, 3] = -math.inf
    query[1, 1, 5, 2] = math.nan
    out = semantic_attention(query, key, value, PROGRAMS["full row"], bias=bias)
    assert (out[0, :, 3] == 0).all()
    assert out.isnan().any(-1).nonzero().tolist() == [[1, 1, 5]] and out[1, 1, 5].isnan().all()


@compiles_whole
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiled_whole_gives_what_eager_gives(backend):
    query, key, value = _qkv()
    text, program = _text(), PROGRAMS["full"]

    def call(query, key, value, gate):
        return semantic_attention(
            query, key, value, program, **{**text, "gate": gate}, heads=[0, 2], grid=GRID, capture=Capture((1, 2)),
            backend=backend,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    for _ in range(2):
        for got, want in zip(
            compiled(query, key, value, text["gate"]), call(query, key, value, text["gate"]), strict=True
        ):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        query = query + 0.1


@compiles_whole
def test_programs_over_the_picture_trace_whole():
    query, key, value = _qkv()
    text, program = _text(), Program(SalienceDropout(0.2, "space"), Refinement(3, 0.3, 0.8, "space"), "content")

    def call(query, key, value):
        return semantic_attention(query, key, value, program, **text, grid=GRID, capture=Capture((1, 2)))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(query, key, value), call(query, key, value), strict=True):
        torch.testing.assert_close(got, want)


def test_custom_ops_pass_opcheck():
    from sdattn_fast.backend import backends

    if backends()["cpu"] is not True:
        pytest.fail(f"the compiled core is not there: {backends()['cpu']}")
    query, key, value = _qkv()
    side = {"batch": B, "heads_count": H, "tokens": N, "device": torch.device("cpu")}
    rows = prepare(PROGRAMS["full"], **side, **_text(), capture=Capture((1, 2))).plan.rows
    arguments = (
        query, key, value, None, 0.3, rows.content, rows.gate, rows.phrases, rows.drop, rows.random_ratio, rows.seed,
        rows.threshold, rows.renormalize, rows.head_mode, rows.capture_tokens, rows.capture_final, rows.capture_mean,
        rows.max_content, rows.max_drop, True, None, None, None, "cpu",
    )  # fmt: skip
    library.opcheck(torch.ops.sdattn_fast.rows.default, arguments)
    over = (2, 0.8, 0.3, True, None, 3, 4, "cpu")
    library.opcheck(torch.ops.sdattn_fast.picture.default, (*arguments[:-5], *over))
    library.opcheck(torch.ops.sdattn_fast.smooth.default, (query, 3, 4, 0.8, 1, None, "cpu"))
