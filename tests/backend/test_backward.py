"""Gradients of the CPU kernel against autograd through the definition, in float64 and given the kernel's own decisions;
and the ways in which autograd, torch.func, torch.compile and checkpointing get at them."""

from __future__ import annotations

import pytest
import torch
from given_decisions import (
    CASES,
    EVERYTHING,
    FULL,
    Case,
    assert_close,
    given,
    inputs_for,
    inputs_of,
    make_program,
    stored_relevance,
    through_autograd,
)  # fmt: skip
from old_torch import compiles_whole
from torch import Tensor, library

from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast import reference as definition
from sdattn_fast.backend import autograd, cpu
from sdattn_fast.functional import prepare
from sdattn_fast.plan import make_plan
from sdattn_fast.reference import reference_attention

pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))

ISAS = cpu.info().get("isas", [])


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


@pytest.fixture
def poisoned(monkeypatch):
    """What the backend allocates is full of NaN, so that nothing left unwritten passes for a result."""

    def poison(make):
        def made(*size, **how):
            x = make(*size, **how)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(0x5A5A5A5A)

        return made

    monkeypatch.setattr(cpu.torch, "empty", poison(torch.empty))
    monkeypatch.setattr(cpu.torch, "empty_like", poison(torch.empty_like))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_given_the_decisions(case, dtype, each_isa, monkeypatch):
    inputs, side = inputs_for(case, dtype)
    rows = make_plan(case.program, side, case.capture).rows
    grad_out = torch.randn(*case.shape[:3], case.shape[5]).to(dtype)
    judged = None
    for isa in each_isa():
        ours, kept, grad_maps = through_autograd("cpu", case, inputs, rows, grad_out)
        if judged is None or not torch.equal(judged, kept):
            judged = kept
            exact = given(kept, case, inputs, side, grad_out, grad_maps, torch.float64, monkeypatch)
            plain = given(kept, case, inputs, side, grad_out, grad_maps, dtype, monkeypatch)
        for name in ours:
            assert_close(f"{isa}: {name}", ours[name], exact[name], plain[name], inputs[name].dtype)


# The definition itself.


@pytest.mark.parametrize(
    "program", [FULL, make_program(0.3, 0.2, "row"), make_program(0.3, None, "content", "random")], ids=str
)
def test_gradcheck_of_the_definition(program):
    query, key, value = (torch.randn(2, 2, s, 3, dtype=torch.float64, requires_grad=True) for s in (4, 6, 6))
    gate = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 1, 6, dtype=torch.float64, requires_grad=True)

    def call(query, key, value, gate, bias):
        return reference_attention(query, key, value, program, gate=gate, bias=bias, **_text())[0]

    assert torch.autograd.gradcheck(call, (query, key, value, gate, bias), fast_mode=True)


def _text():
    protected = torch.zeros(2, 6, dtype=torch.bool)
    protected[:, [0, 5]] = True
    return {"protected": protected, "phrases": torch.tensor([[-1, 0, 0, -1, 1, 1]] * 2)}


# The ways in.

GRID = (3, 4)
SMOOTHED = Program(SalienceDropout(0.3), Refinement(1, 0.4, 0.8), "content")


def _small(dtype=torch.float32):
    query, key, value = (torch.randn(2, 2, s, 8).to(dtype).requires_grad_() for s in (12, 6, 6))
    return query, key, value, (torch.rand(2, 6) + 0.2).requires_grad_()


def _call(query, key, value, gate, backend="cpu", program=SMOOTHED, **more):
    return semantic_attention(query, key, value, program, gate=gate, **_text(), grid=GRID, backend=backend, **more)


def _grads(function, inputs):
    return torch.autograd.grad(function(*inputs).square().sum(), inputs)


def _same(got, want, **tolerance):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_auto_takes_the_kernel_under_autograd():
    inputs = _small()
    _same(_grads(lambda *x: _call(*x, "auto"), inputs), _grads(lambda *x: _call(*x, "reference"), inputs))
    assert type(_call(*inputs, "auto", make_program(0.3)).grad_fn).__name__ == "_RowsBackward"


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(wanted):
    inputs = _small()
    alone = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    (got,) = torch.autograd.grad(_call(*alone).square().sum(), alone[wanted])
    assert torch.equal(got, _grads(_call, inputs)[wanted])


def test_captured_maps_alone_carry_gradients():
    inputs = _small()
    capture = Capture((1, 3))
    loss = {b: _call(*inputs, b, capture=capture)[1].square().sum() for b in ("cpu", "reference")}
    got, want = (torch.autograd.grad(loss[b], [inputs[i] for i in (0, 1, 3)]) for b in ("cpu", "reference"))
    _same(got, want)


@compiles_whole
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(backend):
    inputs = _small()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: _call(*x, capture=Capture((1,))), fullgraph=True, backend=backend)

    def loss(out, maps):
        return out.square().sum() + maps.square().sum()

    got = torch.autograd.grad(loss(*compiled(*inputs)), inputs)
    _same(got, torch.autograd.grad(loss(*_call(*inputs, capture=Capture((1,)))), inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["topk", "random"])
def test_checkpointing(mode, reentrant):
    from torch.utils.checkpoint import checkpoint

    inputs, program = _small(), make_program(0.4, None, "content", mode)
    torch.manual_seed(1)
    want = _grads(lambda *x: _call(*x, program=program), inputs)
    torch.manual_seed(1)
    out = checkpoint(lambda *x: _call(*x, program=program), *inputs, use_reentrant=reentrant)
    out.square().sum().backward()
    _same([x.grad for x in inputs], want)


def test_autocast():
    query, key, value, gate = _small()
    layer = torch.nn.Linear(8, 8)

    def loss(backend):
        with torch.autocast("cpu", torch.bfloat16):
            out = _call(layer(query), layer(key), layer(value), gate, backend)
        assert out.dtype == torch.bfloat16
        return torch.autograd.grad(out.float().square().sum(), [layer.weight, query, gate])

    _same(loss("cpu"), loss("reference"), atol=0.1, rtol=0.1)


def test_torch_func():
    query, key, value, gate = _small()
    inputs = tuple(x.detach() for x in (query, key, value, gate))

    def loss(*x):
        return _call(*x).square().sum()

    _same(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs), _grads(_call, (query, key, value, gate)))
    many = [torch.randn(3, *x.shape) for x in inputs[:3]]
    mapped = torch.func.vmap(_call, in_dims=(0, 0, 0, None))(*many, inputs[3])
    _same(mapped, [_call(*x, inputs[3]) for x in zip(*many, strict=True)])
    some = torch.func.vmap(_call, in_dims=(2, None, 0, None))(many[0].movedim(0, 2), inputs[1], many[2], inputs[3])
    _same(some, [_call(q, inputs[1], v, inputs[3]) for q, v in zip(many[0], many[2], strict=True)])
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 3)), in_dims=(0, None, None, None))
    want = [torch.func.grad(loss, argnums=(0, 1, 3))(q, *inputs[1:]) for q in many[0]]
    for got, one in zip(each(many[0], *inputs[1:]), zip(*want, strict=True), strict=True):
        _same(got, one)


def test_torch_func_with_a_bias_that_is_shared():
    query, key, value, _ = (x.detach() for x in _small())
    bias = torch.randn(1, 2, 12, 6)
    queries = torch.randn(3, *query.shape)

    def loss(bias, query):
        return semantic_attention(query, key, value, FULL, bias=bias, backend="cpu").square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(bias, queries)
    _same(got, [torch.func.grad(loss)(bias, q) for q in queries])
    jacobian = torch.func.jacrev(lambda b: torch.stack([loss(b, q) for q in queries]))(bias)
    _same(jacobian, got)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_random_mode_under_vmap_is_as_in_a_loop(backend):
    query, key, value, _ = (x.detach() for x in _small())
    program = make_program(0.4, mode="random")
    queries = torch.stack([query, query.flip(0)])
    for seed in (3, torch.tensor([3]), torch.tensor([8, 99])):
        call = lambda q: semantic_attention(q, key, value, program, seed=seed, backend=backend)  # noqa: E731, B023
        _same(torch.func.vmap(call)(queries), torch.stack([call(q) for q in queries]))
        loss = lambda q: call(q).square().sum()  # noqa: E731, B023
        _same(torch.func.vmap(torch.func.grad(loss))(queries), torch.stack([torch.func.grad(loss)(q) for q in queries]))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda q: semantic_attention(q, key, value, program, backend=backend))(queries)


def test_under_vmap_samples_may_have_seeds_of_their_own_or_none():
    query, key, value, _ = (x.detach() for x in _small())
    program = make_program(0.4, mode="random")
    seeds = torch.tensor([[5, 9], [2**62, 3]])[:, : query.shape[0]]
    call = lambda seed: semantic_attention(query, key, value, program, seed=seed)  # noqa: E731
    mapped = torch.func.vmap(call, in_dims=1, randomness="different")(seeds.mT.contiguous())
    assert torch.equal(mapped, torch.stack([call(seed) for seed in seeds]))
    one, two = torch.func.vmap(lambda q: semantic_attention(q, key, value, program), randomness="different")(
        torch.stack([query, query])
    )
    assert not torch.equal(one, two)


@pytest.mark.parametrize("smooth", [False, True])
def test_a_second_backward_is_refused(smooth):
    query, key, value, gate = _small()
    program = SMOOTHED if smooth else FULL
    (first,) = torch.autograd.grad(
        _call(query, key, value, gate, program=program).square().sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no gradient of the gradient; backend='reference' has one"):
        first.square().sum().backward()
    op = torch.ops.sdattn_fast.rows_backward
    out = torch.randn(2, 2, 12, 8)
    rest = (None, 1.0, None, None, None, 0, None, None, True, True, 0, None, None, "cpu")
    grads = op(out, None, torch.empty(0, dtype=torch.int32), [True] * 3 + [False] * 3, query, key, value, *rest)
    with pytest.raises(RuntimeError, match="no gradient of the gradient"):
        grads[0].sum().backward()
    (first,) = torch.autograd.grad(_call(query, key, value, gate, "reference").square().sum(), query, create_graph=True)
    first.square().sum().backward()


def test_smoothing_has_all_its_derivatives():
    x = torch.randn(1, 2, 12, 3, requires_grad=True)
    where = torch.tensor([[True, False]])

    def smooth(x):
        return autograd.smooth(x, GRID, 1.3, 2, where, "cpu")

    def weighed(x):
        return (smooth(x) * weight).sum()

    weight = torch.randn(1, 2, 12, 3)
    (grad,) = torch.autograd.grad(weighed(x), x)
    _same([grad], torch.autograd.grad((definition_smooth(x) * weight).sum(), x))
    (first,) = torch.autograd.grad(smooth(x).pow(3).sum(), x, create_graph=True)
    (other,) = torch.autograd.grad(definition_smooth(x).pow(3).sum(), x, create_graph=True)
    _same(
        torch.autograd.grad(first.square().sum(), x), torch.autograd.grad(other.square().sum(), x), rtol=1e-4, atol=1e-4
    )


def definition_smooth(x):
    smoothed = x[:, :1]
    for _ in range(2):
        smoothed = definition._smooth(smoothed, GRID, 1.3)
    return torch.cat([smoothed, x[:, 1:]], 1)


def test_ops_pass_opcheck():
    query, key, value, gate = _small()
    side = {"batch": 2, "heads_count": 2, "tokens": 6, "device": torch.device("cpu")}
    rows = prepare(FULL, **side, gate=gate.detach(), **_text(), capture=Capture((1, 2))).plan.rows
    tokens = torch.tensor([1, 3], dtype=torch.int32)
    sink, heads = torch.zeros(2, 2, 12, requires_grad=True), torch.tensor([1, 0], dtype=torch.uint8)
    bias = torch.randn(1, 2, 1, 6, requires_grad=True)
    a_gate = rows.gate.clone().requires_grad_()
    forward = (
        query, key, value, bias, 0.3, rows.content, a_gate, rows.phrases, rows.drop, rows.random_ratio, rows.seed,
        rows.threshold, rows.renormalize, rows.head_mode, rows.capture_tokens, rows.capture_final, rows.capture_mean,
        rows.max_content, rows.max_drop, True, sink, tokens, heads, "cpu",
    )  # fmt: skip
    library.opcheck(torch.ops.sdattn_fast.rows.default, forward)
    out, maps, bits = torch.ops.sdattn_fast.rows(*forward)
    backward = (
        torch.randn_like(out), torch.randn_like(maps), bits, [True] * 6, query, key, value, bias, 0.3, rows.content,
        a_gate, rows.phrases, rows.renormalize, rows.head_mode, rows.capture_tokens, rows.capture_final,
        rows.capture_mean, rows.max_content, tokens, heads, "cpu",
    )  # fmt: skip
    detached = [x.detach() if isinstance(x, Tensor) else x for x in backward]
    library.opcheck(torch.ops.sdattn_fast.rows_backward.default, tuple(detached))
    library.opcheck(torch.ops.sdattn_fast.smooth.default, (query, 3, 4, 0.8, 1, None, "cpu"))


# What it costs, and what it must not do.


def test_nothing_of_a_maps_size_is_saved():
    query, key, value = (torch.randn(1, 2, s, 8).requires_grad_() for s in (2048, 77, 77))
    sizes = []

    def pack(x):
        sizes.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        semantic_attention(query, key, value, FULL, backend="cpu")
        bits = 2 * 2048 * 3 * 4
        token_side = 77 + 4
        assert sum(sizes) == sum(x.numel() * 4 for x in (query, key, value)) + bits + token_side
        sizes.clear()
        semantic_attention(query, key, value, Program(), backend="cpu")
        assert sum(sizes) == sum(x.numel() * 4 for x in (query, key, value)), "nothing decided, no bits"


def test_the_same_numbers_whatever_the_threads():
    case = Case((2, 3, 1100, 77, 40, 40), has=EVERYTHING, bias="pixel")
    inputs, side = inputs_for(case, torch.float32)
    rows = make_plan(FULL, side).rows
    _, _, bits = cpu.attention(*inputs_of(inputs), 0.2, rows, return_bits=True)
    grad_out, before = torch.randn(2, 3, 1100, 40), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            tokens = torch.tensor([3, 5], dtype=torch.int32)
            found.append(cpu.backward(grad_out, None, *inputs_of(inputs), 0.2, rows, bits, [True] * 6, tokens))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype, each_isa):
    case = Case((2, 3, 70, 30, 40, 24), has=EVERYTHING)
    inputs, side = inputs_for(case, dtype)
    rows = make_plan(FULL, side).rows
    grad_out = torch.randn(2, 3, 70, 24).to(dtype)
    _, _, bits = cpu.attention(*inputs_of(inputs), 0.2, rows, return_bits=True)
    for _ in each_isa():

        def run(query, key, value, grad):
            return cpu.backward(grad, None, query, key, value, None, 0.2, rows, bits, [True] * 5 + [False])[:5]

        plain = (*inputs_of(inputs)[:3], grad_out)
        want = run(*plain)
        swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
        got = run(*swapped)
        assert got[0].transpose(1, 2).is_contiguous(), "the gradient lies as the query does"
        wide = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in plain]
        turned = [*plain[:3], grad_out.transpose(2, 3).contiguous().transpose(2, 3)]
        for other in (got, run(*wide), run(*turned)):
            assert all(torch.equal(x, y) for x, y in zip(want, other, strict=True) if x is not None)
    summed = torch.autograd.grad(semantic_attention(*(x.requires_grad_() for x in plain[:3]), FULL).sum(), plain[0])
    assert not summed[0].isnan().any(), "a gradient of ones, expanded"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("empty", range(6))
def test_empty(empty):
    shape = [2, 3, 5, 7, 8, 6]
    shape[empty] = 0
    b, h, m, n, d, dv = shape
    inputs = [torch.randn(s, requires_grad=True) for s in ((b, h, m, d), (b, h, n, d), (b, h, n, dv))]
    bias = torch.randn(h, 1, n, requires_grad=True)
    out, maps = semantic_attention(*inputs, FULL, bias=bias, capture=Capture(), backend="cpu")
    grads = torch.autograd.grad(out.sum() + maps.sum(), [*inputs, bias])
    for x, grad in zip([*inputs, bias], grads, strict=True):
        assert grad.shape == x.shape and not grad.isnan().any()


@pytest.mark.usefixtures("poisoned")
def test_nan_stays_in_its_row_and_in_the_sums_over_rows(each_isa):
    query, key, value = (torch.randn(1, 2, n, 24).requires_grad_() for n in (40, 20, 20))
    bias = torch.zeros(1, 1, 40, 20)
    bias[0, 0, 9] = -float("inf")
    with torch.no_grad():
        query[0, 1, 39, 3] = float("nan")  # in a block with lanes to spare
    for _ in each_isa():
        grads = torch.autograd.grad(semantic_attention(query, key, value, FULL, bias=bias).sum(), (query, key, value))
        assert grads[0][0, 1, 39].isnan().all() and grads[0].isnan().any(-1).sum() == 1
        assert (grads[0][0, :, 9] == 0).all()
        assert not grads[1][0, 0].isnan().any() and grads[1][0, 1].isnan().all()


# Relevance.


@pytest.mark.parametrize("chosen", [None, [0, 2]])
@pytest.mark.parametrize("maps", [False, True])
def test_relevance_is_that_of_the_stored_map(maps, chosen, each_isa):
    b, h, m, n = 2, 3, 300, 20
    query, key, value = (torch.randn(b, h, s, 16) for s in (m, n, n))
    tokens, grad_out, grad_maps = [4, 0, 19], torch.randn(b, h, m, 16), torch.randn(b, 2, m) * maps
    side = {
        "protected": torch.rand(b, n) > 0.6,
        "gate": torch.rand(b, n),
        "heads": [0, 1],
        "active": torch.tensor([True, False]),
    }
    want = stored_relevance(query, key, value, side, grad_out, grad_maps)
    want = want[:, :, :, tokens] if chosen is None else want[:, chosen][:, :, :, tokens]
    for isa in each_isa():
        sink = torch.zeros(b, len(tokens), m, requires_grad=True)
        asked = autograd.Relevance(sink, torch.tensor(tokens, dtype=torch.int32))
        if chosen is not None:
            asked = autograd.Relevance(
                sink, asked.tokens, torch.tensor([i in chosen for i in range(h)]).to(torch.uint8)
            )
        call = prepare(
            FULL, batch=b, heads_count=h, tokens=n, device=query.device, **side, capture=Capture((1, 2)), backend="cpu"
        )
        out, captured = call(query, key, value, relevance=asked)
        (got,) = torch.autograd.grad((out * grad_out).sum() + (captured * grad_maps).sum(), sink)
        torch.testing.assert_close(got, want.sum(1).transpose(1, 2).float(), rtol=1e-4, atol=1e-6, msg=isa)


def test_the_reference_refuses_relevance():
    query, key, value, _ = _small()
    sink = torch.zeros(2, 1, 12, requires_grad=True)
    call = prepare(FULL, batch=2, heads_count=2, tokens=6, device=query.device, backend="reference")
    with pytest.raises(ValueError, match="relevance comes from a fused backward kernel"):
        call(query, key, value, relevance=autograd.Relevance(sink, torch.tensor([1], dtype=torch.int32)))
