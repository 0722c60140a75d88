"""The CUDA backend's Python side, and its kernels on an emulated machine, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch

from sdattn_fast import backend as backends
from sdattn_fast.backend import KernelRefused
from sdattn_fast.backend import cuda as backend
from sdattn_fast.backend.layout import row_program
from sdattn_fast.plan import TokenSide, make_plan
from sdattn_fast.program import Capture, Program, Refinement, SalienceDropout

KERNELS = Path(__file__).parents[1] / "kernels"
SIDE = TokenSide(2, 2, 77, torch.device("cpu"))
FULL = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0), "content")


@pytest.fixture(scope="module")
def emulated():
    """The kernels on CPU tensors, in this process, until the module is done."""
    if why := emulated_cuda.why_not():
        pytest.skip(why)
    kept = backend._cuda, backend._why_not, backend._device_type
    emulated_cuda.use()
    yield backend
    emulated_cuda.emulate()
    backend._cuda, backend._why_not, backend._device_type = kept
    backends._unavailable.clear()


def test_the_kernels_on_the_emulated_machine(emulated):
    """What tests/kernels/interpreted_*.py say of the rows, of smoothing and of layouts, whose failures show
    here."""
    files = [str(KERNELS / f"interpreted_{name}.py") for name in ("rows", "smooth", "layouts")]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "SDATTN_TEST_BACKEND": "emulated-cuda", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=KERNELS, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"


def call(dtype=torch.float16, b=2, h=3, m=70, n=77, d=40, dv=40, program=FULL, capture=None, content=12, **side):
    """Arguments of `attention` but for the options."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, h, *s, generator=generator).to(dtype) for s in ((m, d), (n, d), (n, dv)))
    protected = torch.ones(b, n, dtype=torch.bool)
    protected[:, 1 : 1 + content] = False
    side = TokenSide(b, h, n, q.device, protected=protected, seed=3 + torch.arange(b), **side)
    return q, k, v, None, d**-0.5, make_plan(program, side, capture).rows


CALLS = {
    "bare": dict(),
    "every content": dict(content=77, m=33),
    "words, random": dict(
        gate=torch.rand(2, 1, 77), phrases=torch.arange(77).expand(2, -1) // 3,
        program=Program(SalienceDropout(0.3, mode="random"), renormalize="row"),
    ),
    "mean of maps": dict(capture=Capture((5, 1)), heads=torch.tensor([True, False, True])),
    "D=33": dict(d=33, dv=33),
    "float32": dict(dtype=torch.float32, capture=Capture(reduce="none")),
    "256 tokens": dict(n=256, d=256, dv=256, content=40, h=1, m=20),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_order_of_threads_does_not_matter(emulated, name):
    """Else a kernel would want a barrier that it has not."""
    arguments = call(**CALLS[name])
    emulated_cuda.emulate()
    first = emulated.attention(*arguments, return_bits=True)
    emulated_cuda.emulate(reversed=1)
    second = emulated.attention(*arguments, return_bits=True)
    emulated_cuda.emulate()
    for x, y in zip(first, second, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def test_the_order_of_threads_does_not_matter_to_smoothing(emulated):
    x = torch.randn(1, 2, 12 * 40, 24, dtype=torch.float16)
    first = emulated.smooth(x, (12, 40), 1.2, 1, None)
    emulated_cuda.emulate(reversed=1)
    second = emulated.smooth(x, (12, 40), 1.2, 1, None)
    emulated_cuda.emulate()
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(77, 40), (256, 256), (200, 160)])
def test_devices_with_less_shared_memory_give_the_same(emulated, size, dtype):
    """Keys and values then pass through it piece by piece: sm_86's 99 KiB, and less."""
    n, d = size
    arguments = call(dtype, b=1, h=2, m=33, n=n, d=d, dv=d, content=20)
    emulated_cuda.emulate()
    exact, _, kept = emulated.attention(*arguments, return_bits=True)
    tolerance = 4 * torch.finfo(dtype).eps
    for shared in (101376, 65536):
        emulated_cuda.emulate(major=8, minor=6, multiprocessors=84, shared_per_block=shared)
        out, _, bits = emulated.attention(*arguments, return_bits=True)
        emulated_cuda.emulate()
        assert (bits != kept).float().mean() < 0.01
        same = (bits == kept).all(-1)
        torch.testing.assert_close(out[same], exact[same], rtol=tolerance, atol=tolerance)


def test_smoothing_in_little_shared_memory(emulated):
    x = torch.randn(1, 1, 3 * 200, 4)
    exact = emulated.smooth(x, (3, 200), 30.0, 1, None)
    for shared in (8192, 3300):  # one piece of four channels, then one channel
        emulated_cuda.emulate(shared_per_block=shared)
        torch.testing.assert_close(emulated.smooth(x, (3, 200), 30.0, 1, None), exact, rtol=1e-6, atol=1e-6)
    emulated_cuda.emulate(shared_per_block=1024)
    with pytest.raises(KernelRefused, match="picture"):
        emulated.smooth(x, (3, 200), 30.0, 1, None)
    emulated_cuda.emulate()


def test_errors_say_what_was_wrong(emulated):
    arguments = call()
    emulated_cuda.emulate(major=7, minor=5)
    with pytest.raises(RuntimeError, match=r"older than compute capability 8\.0 \(error -3\)"):
        emulated.attention(*arguments)
    emulated_cuda.emulate()
    sizes = (1, 1, 1, 257, 8, 8)
    none = (0, 0, 0, 0, 0)
    rows = row_program(arguments[5], None)
    with pytest.raises(ValueError, match="tokens"):
        backend._cuda.attention(sizes, 0, 1.0, none, none, none, none, none, 0, 0, 0, rows, 0, 0, 0)
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16"):
        backend._cuda.smooth((1, 1, 1, 1, 1), 7, 0, 0, 0, arguments[0].data_ptr(), 1, 0)


def test_it_is_chosen_by_name(emulated):
    import sdattn_fast

    assert sdattn_fast.backends()["cuda"] is True
    q, k, v, *_ = call()
    out = sdattn_fast.semantic_attention(q, k, v, Program(refine=Refinement(1, 0.0, 0.8)), grid=(7, 10), backend="cuda")
    exact = sdattn_fast.semantic_attention(
        q.double(), k.double(), v.double(), Program(refine=Refinement(1, 0.0, 0.8)), grid=(7, 10), backend="reference"
    )
    torch.testing.assert_close(out.double(), exact, rtol=4e-3, atol=4e-3)
    with pytest.raises(ValueError, match="no backward kernel"):
        sdattn_fast.semantic_attention(q.requires_grad_(), k, v, backend="cuda")


def _reasons(query=None, key=None, value=None, bias=None, needs_grad=False, program=Program()):
    like = torch.empty(2, 2, 5, 16)
    query, key, value = (like if x is None else x for x in (query, key, value))
    return backend.not_supported_reasons(query, key, value, bias, make_plan(program, SIDE), needs_grad)


def test_what_is_not_supported_is_said(monkeypatch):
    monkeypatch.setattr(backend, "_device_type", "cpu")
    assert _reasons() == [] and _reasons(*[torch.empty(2, 2, 5, 16, dtype=torch.bfloat16)] * 3) == []
    assert "no backward kernel" in _reasons(needs_grad=True)[0]
    assert "looks over the picture" in _reasons(program=Program(SalienceDropout(0.2, "space")))[0]
    assert "257 tokens" in _reasons(key=torch.empty(2, 2, 257, 16))[0]
    assert "head dimension 257" in _reasons(value=torch.empty(2, 2, 5, 257))[0]
    assert "head dimension 0" in _reasons(torch.empty(2, 2, 5, 0), torch.empty(2, 2, 5, 0))[0]
    assert "not contiguous" in _reasons(query=torch.empty(2, 2, 16, 5).transpose(-1, -2))[0]
    assert "float64" in _reasons(query=torch.empty(2, 2, 5, 16, dtype=torch.float64))[0]
    assert "float16 and query" in _reasons(key=torch.empty(2, 2, 5, 16, dtype=torch.float16))[0]
    assert "bias is on meta" in _reasons(bias=torch.empty(5, device="meta"))[0]
    monkeypatch.setattr(backend, "_device_type", "cuda")
    assert "query is on cpu" in _reasons()[0]


def test_availability_says_how_to_mend(monkeypatch):
    monkeypatch.setattr(backend, "_device_type", "cuda")
    monkeypatch.setattr(backend, "_cuda", None)
    monkeypatch.setattr(backend, "_why_not", backend._load()[1] or "not built")
    assert backend.availability() == backend._why_not
    info = {"runtime": 13000, "driver": 0, "architectures": "8.0 9.0+PTX"}
    monkeypatch.setattr(backend, "_cuda", SimpleNamespace(info=lambda: info))
    assert backend.availability() == (
        "there is no NVIDIA driver here, and the kernels were built with CUDA 13.0, which wants driver 580 or newer"
    )
    info["driver"] = 12080
    assert "serves CUDA 12.8" in backend.availability()
    info["driver"] = 13010
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in backend.availability()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    for have, words in (((7, 5), "want 8.0"), ((8, 6), None), ((12, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, have=have: have)
        backend._refusal_of_device.cache_clear()
        assert (backend.availability() is None) if words is None else (words in backend.availability())
    info["architectures"] = "8.0 8.6"
    backend._refusal_of_device.cache_clear()
    assert "TORCH_CUDA_ARCH_LIST=12.0" in backend.availability()
    backend._refusal_of_device.cache_clear()


def test_availability_is_a_devices(monkeypatch):
    info = {"runtime": 13000, "driver": 13010, "architectures": "8.0 9.0+PTX"}
    monkeypatch.setattr(backend, "_device_type", "cuda")
    monkeypatch.setattr(backend, "_cuda", SimpleNamespace(info=lambda: info))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 0), (7, 5))[index])
    monkeypatch.setattr(backends, "_unavailable", {})
    backend._refusal_of_device.cache_clear()
    assert backends.unavailable("cuda", torch.device("cuda", 0)) is None
    assert "Card 1 has compute capability 7.5" in backends.unavailable("cuda", torch.device("cuda", 1))
    assert backends.unavailable("cuda") is None, "of the current device"
    backend._refusal_of_device.cache_clear()


def test_a_first_smoothing_may_be_captured(monkeypatch):
    """No copy from the host, and nothing kept that lies in the graph's memory."""
    meta = torch.device("meta")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: pytest.fail("a copy") if a == (meta,) else self)
    monkeypatch.setattr(backend, "_gaussians", {})
    first = backend._gaussian(0.8, meta)
    assert first.device == meta and backend._gaussian(0.8, meta) is first
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    made = []
    monkeypatch.setattr(backend, "gaussian_kernel", lambda sigma, **how: made.append(how["device"]) or object())
    cuda = torch.device("cuda", 0)
    assert backend._gaussian(0.8, cuda) is not backend._gaussian(0.8, cuda)
    assert made == [cuda, cuda]
    kept = object()
    backend._gaussians[0.8, cuda] = SimpleNamespace(get=lambda: kept)
    assert backend._gaussian(0.8, cuda) is kept and made == [cuda, cuda], "made before, it is not made again"


def test_strides_of_dimensions_of_one_say_nothing(emulated):
    """An odd one must not send a call to the slow kernel; what comes out does not hang on it either."""
    x = torch.randn(1000)
    q, odd = x.as_strided((1, 2, 5, 16), (160, 80, 16, 1)), x.as_strided((1, 2, 5, 16), (777, 80, 16, 1))
    assert backend._row_strided(odd)[1:] == backend._row_strided(q)[1:] == (0, 80, 16, 1)
    rows = make_plan(Program(), TokenSide(1, 2, 5, q.device)).rows
    torch.testing.assert_close(
        backend.attention(odd, odd, odd, None, 0.25, rows)[0], backend.attention(q, q, q, None, 0.25, rows)[0],
        rtol=0, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "built_for, runs_on",
    [
        ("8.0", {(8, 0), (8, 6), (8, 9)}),
        ("8.6", {(8, 6), (8, 9)}),
        ("9.0+PTX", {(9, 0), (10, 0), (12, 0)}),
        ("9.0a", {(9, 0)}),
        ("10.0f", {(10, 0), (10, 3)}),
    ],
)
def test_what_a_binary_runs_on(built_for, runs_on):
    devices = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert {d for d in devices if backend._serves(built_for, d)} == (
        runs_on | ({(10, 3)} if built_for.endswith("PTX") else set())
    )
