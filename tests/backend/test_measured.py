"""What "auto" takes where something was measured. No figure here is of a device."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdattn_fast import Program, SalienceDropout
from sdattn_fast import backend as backends
from sdattn_fast.backend import measured
from sdattn_fast.backend.call import AttentionCall
from sdattn_fast.functional import prepare

ORDER = backends._AUTO["cuda"]


def shape(fastest, dtype="float16", batch=2, heads=8, pixels=4096, head_dim=40, tokens=77):
    return {
        "dtype": dtype, "batch": batch, "heads": heads, "pixels": pixels, "head_dim": head_dim, "tokens": tokens,
        "fastest": fastest,
    }  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    """card(shapes): the device is a "Card", on which these shapes were measured."""

    def measure(*shapes):
        monkeypatch.setattr(measured, "_table", lambda: {"Card": list(shapes)} if shapes else {})
        monkeypatch.setattr(measured, "_name", lambda device: "Card")
        measured._nearest.cache_clear()

    yield measure
    measured._nearest.cache_clear()


def order(batch=2, heads=8, pixels=4096, head_dim=40, tokens=77, dtype=torch.float16, device="cuda:0"):
    device = torch.device(device)
    query = SimpleNamespace(shape=(batch, heads, pixels, head_dim), dtype=dtype, device=device)
    return backends._order(query, SimpleNamespace(shape=(batch, heads, tokens, head_dim)))


def test_what_is_shipped_is_whole():
    shipped = json.loads(measured.FILE.read_text())
    assert shipped["about"] and set(shipped) == {"about", "devices"}
    for shapes in shipped["devices"].values():
        for one in shapes:
            assert set(one) == set(shape("")) and one["fastest"] in ORDER


def test_where_nothing_was_measured_the_order_stays(card):
    card()
    assert order() == ORDER
    card(shape("cuda", dtype="bfloat16"), shape("cuda", head_dim=64))
    assert order() == ORDER  # another dtype, another head dimension
    card(shape("cuda"))
    assert order(pixels=0) == ORDER
    assert order(device="cpu") == backends._AUTO["cpu"]


def test_another_device_is_not_known(card, monkeypatch):
    card(shape("cuda"))
    assert order() == ("cuda", "triton")
    monkeypatch.setattr(measured, "_name", lambda device: "Other card")
    assert order() == ORDER


def test_the_nearest_shape_decides(card):
    card(shape("cuda", pixels=4096), shape("triton", pixels=256), shape("cuda", pixels=256, batch=16))
    assert order(pixels=4096) == ("cuda", "triton")
    assert order(pixels=256) == ("triton", "cuda")
    # 1024 is as many times 256 as 4096 is of it.
    assert order(pixels=1025)[0] == "cuda" and order(pixels=1023)[0] == "triton"
    assert order(pixels=256, batch=16)[0] == "cuda" and order(pixels=256, batch=3)[0] == "triton"
    card(shape("cuda", tokens=154), shape("triton"))
    assert order(tokens=160)[0] == "cuda" and order(tokens=80)[0] == "triton"


def test_what_cannot_serve_is_passed_over(card, monkeypatch):
    card(shape("cuda"))
    query = SimpleNamespace(shape=(2, 8, 4096, 40), dtype=torch.float16, device=torch.device("cuda:0"))
    call = AttentionCall(None, query, query, query, None, 1.0, None, None, needs_grad=False)
    monkeypatch.setattr(backends, "_reasons", lambda name, *_: ["not built"] if name == "cuda" else [])
    assert backends.choose("auto", call) == "triton"
    monkeypatch.setattr(backends, "_reasons", lambda name, *_: [])
    assert backends.choose("auto", call) == "cuda"
    assert backends.choose("triton", call) == "triton"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_read_no_file(card, monkeypatch, dynamic):
    """In one graph: what is read and asked of the device is a constant of it."""
    card(shape("cuda", dtype="float32", pixels=64), shape("triton", dtype="float32", pixels=4))

    def known(device):
        return measured._name(device) in json.loads(json.dumps(measured._table()))

    known._dynamo_marked_constant = True
    monkeypatch.setattr(measured, "is_known", known)
    monkeypatch.setattr(backends, "_AUTO", {"cpu": ("triton", "cuda")})

    def first(query, key):
        return query + (1 if backends._order(query, key)[0] == "cuda" else 2)

    torch._dynamo.reset()
    compiled = torch.compile(first, backend="eager", fullgraph=True, dynamic=dynamic)
    key = torch.zeros(2, 8, 77, 40)
    assert compiled(torch.zeros(2, 8, 64, 40), key).max() == 1
    assert compiled(torch.zeros(2, 8, 4, 40), key).max() == 2


@pytest.mark.parametrize("name", ["triton", "cuda", "auto"])
def test_a_choice_on_a_gpu_compiles_whole(card, monkeypatch, name):
    """On tensors of a device that is not here: a look at the device that is traced breaks the graph on one that is."""
    card(shape("cuda"))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "_unavailable", {("triton", gpu): None, ("cuda", gpu): None})
    monkeypatch.setattr(backends.triton.gpu, "interprets", lambda: False)
    monkeypatch.setattr(backends.cuda, "_device_type", "cuda")
    prepared = prepare(Program(SalienceDropout(0.3)), batch=2, heads_count=8, tokens=77, device="cpu")

    def serves(query, key, value):
        call = AttentionCall(prepared, query, key, value, None, 1.0, None, None, needs_grad=False)
        return query.new_zeros(backends.NAMES.index(backends.choose(name, call)))

    torch._dynamo.reset()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")  # dynamo warns of a function with a cache, which it traces
        tensors = [torch.empty(2, 8, n, 40, device=gpu, dtype=torch.float16) for n in (64, 77, 77)]
        found = torch.compile(serves, backend="eager", fullgraph=True)(*tensors)
    assert backends.NAMES[len(found)] == ("cuda" if name == "auto" else name)
