"""A step that repeats the one before is bound, and anything that moves in between unbinds it: what comes out is always
what a patch without a text cache gives, which looks at everything anew."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from side_by_side import side_by_side
from torch import Tensor, nn

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.backend import KernelRefused
from sdattn_fast.execute import BoundCall
from sdattn_fast.patching import bound as module

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
FULL = Program(SalienceDropout(0.3), Refinement(1, 0.2, 0.8), "content")


class Twins:
    """Two UNets that share their weights' values, one with the text cache."""

    def __init__(self, unet: nn.Module, program: Program = FULL, **asked: Any) -> None:
        self.unets: list[Any] = [copy.deepcopy(unet).eval().requires_grad_(False) for _ in range(2)]
        torch.manual_seed(1)
        asked = {"gate": torch.rand(77) + 0.5, "protected": torch.arange(77) > 30, "fold": "never", **asked}
        self.patches = [
            sdattn_fast.apply(one, program, **{**asked, **({} if cached else {"text_cache": False, "fold": "auto"})})
            for one, cached in zip(self.unets, (True, False), strict=True)
        ]
        self.text = torch.randn(2, 77, 32)
        self.x = torch.randn(2, 4, 8, 8)
        self.time = 5

    def each(self, change: Callable[[Any], object]) -> None:
        for unet in self.unets:
            change(unet)

    def attns(self) -> list[Any]:
        return [unet.get_submodule(LAYER) for unet in self.unets]

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            outs = [unet(self.x, self.time, self.text).sample for unet in self.unets]
            torch.testing.assert_close(outs[0], outs[1], atol=2e-5, rtol=1e-4)
            if self.patches[0]._keeper is not None:
                maps = [patch.maps for patch in self.patches]
                assert set(maps[0]) == set(maps[1])
                for name in maps[0]:
                    torch.testing.assert_close(maps[0][name], maps[1][name], atol=2e-5, rtol=1e-4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bound calls that were made."""
    made: list[Any] = []
    call = BoundCall.__call__

    def spied(self: BoundCall, *args: Any) -> Any:
        made.append(self)
        return call(self, *args)

    monkeypatch.setattr(BoundCall, "__call__", spied)
    fold = module.BoundFold.__call__

    def spied_fold(self: module.BoundFold, *args: Any) -> Any:
        made.append(self)
        return fold(self, *args)

    monkeypatch.setattr(module.BoundFold, "__call__", spied_fold)
    return made


@pytest.mark.parametrize(
    ("program", "asked"),
    [
        (Program(), {}),
        (FULL, {}),
        (FULL, {"capture": Capture((1, 2), layers="*")}),
        (Program(SalienceDropout(0.3, mode="random")), {"seed": 7}),
        (Program(SalienceDropout(0.3, "space"), Refinement(2, 0.2, 0.8, "space"), "row"), {"capture": Capture((1,))}),
        (FULL, {"heads": [0], "inactive_heads": "zero"}),
        (Program(None, None, "row"), {"phrases": torch.arange(77) // 2}),
        (Program(), {"backend": "cpu"}),
        (Program(SalienceDropout(0.3)), {"fold": "always"}),
        (FULL, {"fold": "always", "heads": [0], "inactive_heads": "zero"}),
        (FULL, {"fold": "auto", "capture": Capture((1,), layers="*")}),
    ],
)
@torch.no_grad()
def test_later_steps_are_bound(
    program: Program, asked: dict[str, Any], parts: dict[str, Any], calls: list[Any]
) -> None:
    twins = Twins(parts["small"], program, **asked)
    for step in range(4):
        twins.time = 9 - step
        twins.x = torch.randn(2, 4, 8, 8)
        before = len(calls)
        twins.step()
        expected = 0 if step == 0 else len(twins.patches[0].layers)
        assert len(calls) - before == expected


# Where folding cannot be.
NEVER_FOLDED = (
    "gradients",
    "autocast",
    "a hook",
    "another dtype",
    "a learnt gate",
    "inference mode",
    "a norm of the query",
)


@contextmanager
def _hook(twins: Twins) -> Iterator[None]:
    handles = [attn.to_k.register_forward_hook(lambda m, a, out: out * 2) for attn in twins.attns()]
    yield
    for handle in handles:
        handle.remove()


def _set(twins: Twins, name: str, value: Any) -> None:
    for attn in twins.attns():
        setattr(attn, name, value)


def _weights(twins: Twins, change: Callable[[nn.Parameter], object]) -> None:
    for attn in twins.attns():
        change(attn.to_v.weight)


def _replaced(twins: Twins) -> None:
    for attn in twins.attns():
        attn.to_k = nn.Linear(32, attn.to_k.out_features, bias=False)
        nn.init.constant_(attn.to_k.weight, 0.1)


def _update(twins: Twins, **inputs: Any) -> None:
    for patch in twins.patches:
        patch.update(**inputs)


def _bias(twins: Twins, bias: Tensor | None) -> None:
    for patch in twins.patches:
        patch.current_call.biases["test"] = {} if bias is None else dict.fromkeys(patch.layers, bias)


def _smaller(twins: Twins) -> None:
    twins.x = torch.randn(2, 4, 8, 16)


def _text(twins: Twins, text: Tensor) -> None:
    twins.text = text


def _double(twins: Twins) -> None:
    twins.each(lambda unet: unet.double())
    twins.x, twins.text = twins.x.double(), twins.text.double()


def _batch(twins: Twins) -> None:
    twins.text, twins.x = torch.randn(3, 77, 32), torch.randn(3, 4, 8, 8)


CHANGES: dict[str, Callable[[Twins], Any]] = {
    "weights in place": lambda w: _weights(w, lambda p: p.mul_(1.5)),
    "weights' data": lambda w: _weights(w, lambda p: setattr(p, "data", p.data * 1.5)),
    "weights through .data": lambda w: _weights(w, lambda p: p.data.mul_(1.5)),
    "the query's weights": lambda w: [attn.to_q.weight.mul_(1.5) for attn in w.attns()],
    "the output's weights": lambda w: [attn.to_out[0].bias.add_(1.5) for attn in w.attns()],
    "another module": _replaced,
    "a hook": _hook,
    "a gate": lambda w: _update(w, gate=torch.rand(77)),
    "no gate": lambda w: _update(w, gate=None),
    "a learnt gate": lambda w: _update(w, gate=torch.rand(77, requires_grad=True)),
    "token classes": lambda w: _update(w, protected=torch.arange(77) > 5),
    "entries": lambda w: _update(w, active=torch.tensor([False, True])),
    "another text": lambda w: _text(w, torch.randn(2, 77, 32)),
    "text written over": lambda w: w.text.mul_(0.5),
    "a copy of the text": lambda w: _text(w, w.text.clone()),
    "a batch": _batch,
    "a grid": _smaller,
    "a bias": lambda w: _bias(w, torch.randn(1, 1, 1, 77)),
    "a grid of as many pixels": lambda w: setattr(w, "x", torch.randn(2, 4, 4, 16)),
    "gradients": lambda w: torch.enable_grad(),
    "autocast": lambda w: torch.autocast("cpu", torch.bfloat16),
    "inference mode": lambda w: torch.inference_mode(),
    "another dtype": _double,
    "a norm of the query": lambda w: [setattr(attn, "norm_q", nn.LayerNorm(8)) for attn in w.attns()],
    "a scale": lambda w: _set(w, "scale_qk", False),
    "train mode": lambda w: w.each(lambda unet: unet.train()),
}


# "always" raises where folding cannot be, and rightly.
HOW = [
    pytest.param(change, fold, id=f"{change}-{fold}")
    for change in CHANGES
    for fold in ("never", "auto", *(() if change in NEVER_FOLDED else ("always",)))
]


@pytest.mark.parametrize("change, fold", HOW)
@torch.no_grad()
def test_what_moves_is_seen(change: str, fold: str, parts: dict[str, Any], calls: list[Any]) -> None:
    maps = None if change in ("gradients", "autocast") else Capture((1,), layers="*")
    twins = Twins(parts["small"], capture=maps, fold=fold)
    twins.step(2)
    assert calls
    made = CHANGES[change](twins)
    tolerant = change == "autocast"  # in bfloat16 a text cache rounds elsewhere
    with made if hasattr(made, "__enter__") else nullcontext():
        if tolerant:
            for _ in range(3):
                twins.unets[0](twins.x, twins.time, twins.text)
        else:
            twins.step(3)
    twins.step(2)


@torch.no_grad()
def test_dropout_in_training(parts: dict[str, Any], calls: list[Any]) -> None:
    twins = Twins(parts["small"], dropout_when="training")
    for train in (False, True, True, False, True):
        twins.each(lambda unet, train=train: unet.train(train))
        twins.step(2)
    assert calls


@torch.no_grad()
def test_a_schedule(parts: dict[str, Any]) -> None:
    twins = Twins(parts["small"], dropout_when={0: 0.9, 3: 0.1})
    for time in (9, 8, 7, 6, 5, 9, 8):
        twins.time = time
        twins.step()


@torch.no_grad()
def test_texts_in_turn(parts: dict[str, Any], calls: list[Any]) -> None:
    twins = Twins(parts["small"])
    texts = [torch.randn(2, 77, 32) for _ in range(2)]
    for step in range(4):
        for text in texts:
            twins.text = text
            before = len(calls)
            twins.step()
            assert len(calls) - before == (len(twins.patches[0].layers) if step else 0)


@torch.no_grad()
def test_another_stream_is_not_served(parts: dict[str, Any], calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(parts["small"])
    for stream, expected in ((1, False), (1, True), (2, False), (2, True), (1, False)):
        monkeypatch.setattr(module, "current_stream", lambda device, stream=stream: stream)
        calls.clear()
        twins.step()
        assert bool(calls) == expected


@torch.no_grad()
def test_a_refusal_is_passed_on(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that stops launching is what it is without binding: the unbound call decides."""
    twins = Twins(parts["small"])
    twins.step(2)

    def refuses(self: BoundCall, *args: Any) -> Any:
        raise KernelRefused("cpu", "rows_kernel: gone")

    monkeypatch.setattr(BoundCall, "__call__", refuses)
    twins.step()


@torch.no_grad()
def test_nothing_of_a_forgotten_text_stays(parts: dict[str, Any]) -> None:
    twins = Twins(parts["small"])
    twins.step(3)
    cached = twins.patches[0]._models[0].text.cached
    keys = [weakref.ref(entry.key) for of in cached._entries.values() for entry in of.values()]
    assert keys and all(key() is not None for key in keys)
    calls = [weakref.ref(ready.prepared) for ready in twins.patches[0]._models[0].text.cache.values()]
    twins.patches[0].refresh()
    gc.collect()
    assert all(kept() is None for kept in keys + calls)


@torch.no_grad()
def test_nothing_of_a_changed_gate_stays(parts: dict[str, Any]) -> None:
    twins = Twins(parts["small"])
    twins.step(2)
    calls = [weakref.ref(ready.prepared) for ready in twins.patches[0]._models[0].text.cache.values()]
    _update(twins, gate=torch.rand(77))
    with torch.enable_grad():
        twins.step()
    gc.collect()
    assert calls and all(call() is None for call in calls)


@torch.no_grad()
def test_without_the_text_cache_no_text_is_looked_at(parts: dict[str, Any]) -> None:
    twins = Twins(parts["small"])
    twins.step(2)
    assert twins.patches[1]._models[0].text.cached.bytes() == 0
    assert all(layer.text.cached._looked_at is None for layer in twins.patches[1]._layers)


@torch.no_grad()
def test_a_query_is_projected_once(parts: dict[str, Any]) -> None:
    twins, counts = Twins(parts["small"]), []
    twins.step(2)
    twins.attns()[0].to_q.register_forward_hook(lambda *_: counts.append(1))
    for size in (8, 16, 16, 8):
        twins.unets[0](torch.randn(2, 4, 8, size), 5, twins.text)
    twins.attns()[0].to_q.register_forward_hook(lambda module, args, out: out.transpose(1, 2).clone().transpose(1, 2))
    twins.unets[0](torch.randn(2, 4, 8, 8), 5, twins.text)
    assert len(counts) == 5


@torch.no_grad()
def test_threads(parts: dict[str, Any]) -> None:
    """Several loops over one UNet, each with its own text."""
    twins = Twins(parts["small"], Program(SalienceDropout(0.3)))
    texts = [torch.randn(2, 77, 32) for _ in range(3)]
    exact = [twins.unets[1](twins.x, 5, text).sample for text in texts]

    def loop(i: int) -> None:
        for _ in range(6):
            got = twins.unets[0](twins.x, 5, texts[i]).sample
            torch.testing.assert_close(got, exact[i], atol=2e-5, rtol=1e-4)

    side_by_side(loop, range(3))
