"""What happens where a kernel does not compile or launch: "auto" goes on, once and for all; a name raises.

On the CPU a backend called "broken" goes first: the CPU backend, with parts of it replaced by what raises as a launcher
does. Results are held against the reference.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

from sdattn_fast import Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast import backend as backends
from sdattn_fast.backend import KernelRefused, cpu
from sdattn_fast.backend.refusal import launching
from sdattn_fast.guidance.crf import dense_crf

pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
FULL = Program(SalienceDropout(0.2), Refinement(1, 0.2, 0.6), "content")


class CompilationError(Exception):
    pass


def fails(*args, **kwargs):
    with launching("broken", "rows_kernel"):
        try:
            raise ValueError("error: a detail\n  of the layout\nout of registers: 400 > 255\n")
        except ValueError as cause:
            raise CompilationError("at 3:4:\n    a line of the kernel\n    ^") from cause


@pytest.fixture
def broken(monkeypatch):
    """The backend "broken"; what it is asked for is counted in `calls`."""
    module = SimpleNamespace(
        **{name: getattr(cpu, name) for name in cpu.__all__ if name not in ("info", "set_isa")}, backward=cpu.backward,
        calls=0,
    )  # fmt: skip

    def attention(*args, **kwargs):
        module.calls += 1
        return fails()

    module.attention = module.picture_attention = attention
    monkeypatch.setitem(backends._FUSED, "broken", module)
    monkeypatch.setattr(backends, "_AUTO", {"cpu": ("broken", "cpu")})
    monkeypatch.setattr(backends, "NAMES", ("broken", *backends.NAMES))
    monkeypatch.setattr("sdattn_fast.functional.NAMES", backends.NAMES)
    for state in ("_failures", "_unavailable"):
        monkeypatch.setattr(backends, state, {})
    monkeypatch.setattr(backends, "_said", set())
    return module


def inputs(d=16, requires_grad=False):
    q, k, v = (torch.randn(2, 2, length, d, requires_grad=requires_grad) for length in (12, 9, 9))
    side = {"protected": torch.arange(9).expand(2, 9) == 0, "gate": torch.rand(2, 9) + 0.5, "grid": (3, 4)}
    return (q, k, v), side


def test_the_error_has_the_compilers_last_line():
    with pytest.raises(
        KernelRefused, match=r"'broken' could not launch rows_kernel: ValueError: out of registers"
    ) as e:
        fails()
    assert isinstance(e.value.__cause__, CompilationError)


def test_the_error_goes_from_process_to_process():
    with pytest.raises(KernelRefused) as raised:
        fails()
    again = copy.copy(raised.value)  # by the way that pickle goes
    assert (str(again), again.backend, again.reason) == (str(raised.value), "broken", raised.value.reason)


def test_out_of_memory_is_no_refusal():
    with pytest.raises(torch.OutOfMemoryError), launching("broken", "rows_kernel"):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("program", [FULL, Program(None, Refinement(2, 0.2, 0.6))], ids=["rows", "picture"])
def test_auto_goes_on_and_says_so_once(program, broken):
    qkv, side = inputs()
    with pytest.warns(UserWarning, match=r"'cpu' serves calls like this one.*out of registers: 400 > 255") as said:
        out = semantic_attention(*qkv, program, **side)
    assert len(said) == 1
    torch.testing.assert_close(out, semantic_attention(*qkv, program, **side, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = semantic_attention(*qkv, program, **side)
    assert broken.calls == 1, "a compiler that failed is not asked again"
    torch.testing.assert_close(again, out)
    semantic_attention(*inputs(d=8)[0], program, **side)
    assert broken.calls == 2, "calls of another kind are still tried"


def test_auto_ends_at_the_reference(broken, monkeypatch):
    monkeypatch.setattr(backends, "_AUTO", {"cpu": ("broken",)})
    qkv, side = inputs()
    with pytest.warns(UserWarning, match=r"plain torch reference serves this call.*out of registers") as said:
        out = semantic_attention(*qkv, FULL, **side)
    assert len(said) == 1
    torch.testing.assert_close(out, semantic_attention(*qkv, FULL, **side, backend="reference"))


def test_a_backend_that_was_named_raises_every_time(broken):
    qkv, side = inputs()
    for _ in range(2):
        with pytest.raises(KernelRefused, match="out of registers"):
            semantic_attention(*qkv, FULL, **side, backend="broken")
    assert broken.calls == 2


@pytest.mark.parametrize("program", [FULL, Program(), Program(SalienceDropout(0.3, mode="random"))])
def test_a_backward_kernel_alone_may_fail(program, broken):
    """The gradients are the reference's, and the next forward goes elsewhere."""
    broken.attention, broken.backward = cpu.attention, fails
    (q, k, v), side = inputs(requires_grad=True)
    gate = side.pop("gate").requires_grad_()
    bias = torch.randn(2, 2, 12, 9, requires_grad=True)
    leaves = (q, k, v, gate, bias)
    weight = torch.randn(2, 2, 12, 16)

    def gradients(**how):
        out = semantic_attention(q, k, v, program, gate=gate, bias=bias, seed=3, **side, **how)
        return torch.autograd.grad((out * weight).sum(), leaves)

    found = gradients()
    for mine, theirs in zip(found, gradients(backend="reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert any("out of registers" in reason for reason in backends._failures.values())
    broken.attention = fails
    for mine, theirs in zip(gradients(), found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(KernelRefused):
        gradients(backend="broken")


def test_the_graph_frees_its_inputs_as_without_a_fallback():
    """Layer by layer, while the loss and with it the graph's nodes are still there."""
    (q, k, v), _ = inputs(requires_grad=True)
    inner = [x * 1 for x in (q, k, v)]
    alive = [weakref.ref(x) for x in inner]
    loss = semantic_attention(*inner, FULL, grid=(3, 4)).sum()
    del inner
    loss.backward()
    assert [x() for x in alive] == [None] * 3 and loss.grad_fn is not None


def test_relevance_has_no_plain_gradients(broken):
    from sdattn_fast.backend.autograd import Relevance
    from sdattn_fast.functional import prepare

    broken.attention, broken.backward = cpu.attention, fails
    (q, k, v), _ = inputs(requires_grad=True)
    sink = torch.zeros(2, 1, 12, requires_grad=True)
    prepared = prepare(Program(), batch=2, heads_count=2, tokens=9, device="cpu")
    out, _ = prepared(q, k, v, relevance=Relevance(sink, torch.tensor([1], dtype=torch.int32)))
    with pytest.raises(KernelRefused):
        out.sum().backward()


def test_a_crf_too(monkeypatch):
    for state in ("_failures", "_said"):
        monkeypatch.setattr(backends, state, type(getattr(backends, state))())
    unary, image = torch.rand(3, 6, 7), torch.rand(6, 7, 3) * 255
    expected = dense_crf(unary, image, backend="reference")
    calls = []
    monkeypatch.setattr(cpu, "gaussian_attention", lambda *a: calls.append(a) or fails())
    with pytest.warns(UserWarning, match=r"reference serves dense_crf.*out of registers"):
        found = dense_crf(unary, image)
    torch.testing.assert_close(found, expected)
    dense_crf(unary, image)
    assert len(calls) == 1
    with pytest.raises(KernelRefused):
        dense_crf(unary, image, backend="cpu")
