"""Calls to differentiate, and their gradients by the definition: in any precision, given what a kernel decided.

A rounding error flips a near-tie, so a backend's gradients are held against autograd through the definition with the
backend's own selection in the place of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast import reference as definition
from sdattn_fast.backend import autograd, fused
from sdattn_fast.plan import TokenSide
from sdattn_fast.reference import reference_attention

FULL = Program(SalienceDropout(0.2), Refinement(threshold=0.3, sigma=0), "content")
EVERYTHING = ("gate", "phrases", "protected", "active", "heads")


def make_program(ratio=None, threshold=None, renormalize="none", mode="topk"):
    dropout = None if ratio is None else SalienceDropout(ratio, mode=mode)
    refine = None if threshold is None else Refinement(threshold=threshold, sigma=0)
    return Program(dropout, refine, renormalize)


@dataclass
class Case:
    """B, H, M, N, D, Dv; the program; which parts of the token side and which shape of bias to make up."""

    shape: tuple[int, int, int, int, int, int]
    program: Program = FULL
    has: tuple[str, ...] = ()
    bias: str | None = None
    capture: Capture | None = None
    side: dict = field(default_factory=dict)

    def __str__(self) -> str:
        p, c = self.program, self.capture
        words = ["x".join(map(str, self.shape)), "" if p.dropout is None else f"{p.dropout.mode}{p.dropout.ratio}"]
        words += ["" if p.refine is None else f"nms{p.refine.threshold}", p.renormalize, *self.has, self.bias]
        words += [None if c is None else f"{c.stage}-{c.reduce}", *self.side.values()]
        return "-".join(str(w) for w in words if w)


SIZES = 9  # so many of the cases are about sizes
CASES = [
    # Sizes: every tile of lanes and columns, chunks of rows, D != Dv.
    Case((1, 1, 1, 1, 1, 1)),
    Case((1, 2, 33, 7, 8, 8), has=EVERYTHING),
    Case((2, 3, 100, 77, 40, 40), has=EVERYTHING),
    Case((2, 2, 1100, 77, 64, 64), has=("gate", "protected")),
    Case((1, 2, 33, 154, 80, 80), has=EVERYTHING),
    Case((1, 1, 100, 77, 160, 160), has=EVERYTHING),
    Case((1, 1, 33, 256, 256, 256), has=("gate", "protected")),
    Case((1, 2, 17, 31, 13, 29), has=EVERYTHING),
    Case((1, 1, 50, 33, 97, 3), has=("gate",)),
    # Programs.
    Case((2, 2, 100, 77, 40, 40), Program()),
    *(
        Case((1, 2, 65, 77, 40, 40), make_program(0.2, 0.5, r), ("gate", "protected"))
        for r in ("none", "content", "row")
    ),
    *(Case((1, 2, 65, 40, 40, 40), make_program(None, None, r), ("gate",)) for r in ("content", "row")),
    Case((1, 2, 65, 40, 40, 40), make_program(0.3), ("phrases",)),
    *(Case((1, 2, 65, 40, 40, 40), make_program(1.0, None, r), ("protected",)) for r in ("none", "content", "row")),
    Case((1, 2, 65, 40, 40, 40), make_program(1.0, None, "content")),
    *(Case((2, 2, 65, 77, 40, 40), make_program(0.3, 0.1, r, "random"), ("protected",)) for r in ("content", "row")),
    # Gates.
    Case((2, 3, 64, 77, 40, 40), has=("gate_by_head", "protected")),
    *(Case((2, 3, 64, 20, 40, 40), make_program(0.2, 0.0, r), has=("hard_gate",)) for r in ("content", "row")),
    # Heads, bias, maps.
    *(Case((2, 3, 65, 77, 40, 40), has=EVERYTHING, side={"inactive_heads": i}) for i in ("plain", "zero")),
    *(
        Case((2, 3, 300, 30, 16, 16), has=("protected",), bias=b)
        for b in ("column", "batch", "full", "pixel", "heads", "turned", "-inf")
    ),
    *(
        Case((2, 3, 65, 30, 16, 16), FULL, EVERYTHING, None, Capture((5, 0), stage, reduce), {"inactive_heads": i})
        for stage in ("softmax", "final") for reduce in ("mean", "none") for i in ("plain", "zero")
    ),
]  # fmt: skip


def through_autograd(backend, case, inputs, rows, grad_out):
    """Gradients through autograd's function, as the package runs it; what the forward pass decided, (B, H, M, N) bool;
    and the gradient of the maps that went in."""
    x = {name: y.clone().requires_grad_() for name, y in inputs.items()}
    rows = rows if "gate" not in x or rows.gate is None else type(rows)(**{**vars(rows), "gate": x["gate"]})
    scale, n = case.shape[4] ** -0.5, case.shape[3]
    out, maps, bits = fused(backend).attention(*inputs_of(inputs), scale, rows, return_bits=True)
    got, got_maps = autograd.attention(*inputs_of(x), scale, rows, backend)
    assert torch.equal(got, out) and (maps is None or torch.equal(got_maps, maps))
    grad_maps = None if maps is None else torch.cos(torch.arange(maps.numel(), device=maps.device)).reshape(maps.shape)
    outputs, grads = [got], [grad_out]
    if maps is not None:
        outputs, grads = [got, got_maps], [grad_out, grad_maps]
    of = {name: y for name, y in x.items() if name != "gate" or rows.gate is not None}
    return (
        dict(zip(of, torch.autograd.grad(outputs, list(of.values()), grads), strict=True)),
        unpacked(bits, n),
        grad_maps,
    )


def inputs_of(x):
    return x["query"], x["key"], x["value"], x.get("bias")


def given(kept, case, inputs, side, grad_out, grad_maps, dtype, monkeypatch) -> dict[str, Tensor]:
    """Autograd through the definition, its decisions replaced; what is no input of the query's dtype stays float64."""
    with monkeypatch.context() as patch:
        patch.setattr(definition, "_salient", lambda p, c, *_: c & ~kept)
        patch.setattr(definition, "_suppressed", lambda p, c, *_: c & ~kept)
        x = {name: y.to(dtype).requires_grad_() for name, y in inputs.items()}
        query, key, value, bias = inputs_of(x)
        out, maps = reference_attention(
            query, key, value, case.program, bias=bias, gate=x.get("gate"), phrases=side.phrases,
            protected=side.protected, active=side.active, heads=side.heads, inactive_heads=side.inactive_heads,
            capture=case.capture,
        )  # fmt: skip
        outputs, grads = ([out], [grad_out.to(dtype)])
        if maps is not None:
            outputs, grads = [out, maps], [grad_out.to(dtype), grad_maps]
        found = torch.autograd.grad(outputs, list(x.values()), grads, allow_unused=True)
    zero = {name: torch.zeros_like(y) for name, y in x.items()}
    return {name: zero[name] if g is None else g for name, g in zip(x, found, strict=True)}


def assert_close(what: str, got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Twice plain torch's error in the mean square; the largest single one scatters, so four times."""
    assert got.dtype == dtype and got.shape == exact.shape and not got.isnan().any(), what
    ours, torchs = (got.double() - exact).abs(), (plain.double() - exact).abs()
    # Some are zero but for rounding; and a GPU's exp2 of a float32 logit is a few units off, where torch's is float64.
    units = 8 if dtype == torch.float32 else 2
    floor = units * torch.finfo(dtype).eps * max(float(exact.abs().max()), 0.1)
    mean, mean_of_torch = (float(e.square().mean().sqrt()) for e in (ours, torchs))
    assert mean <= max(2 * mean_of_torch, floor), f"{what}: error {mean:.3g}, plain torch {mean_of_torch:.3g}"
    assert ours.max() <= max(4 * float(torchs.max()), 4 * floor), f"{what}: {ours.max():.3g}, torch {torchs.max():.3g}"


def unpacked(bits: Tensor, n: int) -> Tensor:
    place = torch.arange(n, device=bits.device)
    return ((bits[..., place // 32] >> (place % 32)) & 1).bool()


def inputs_for(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor], TokenSide]:
    b, h, m, n, d, dv = case.shape
    rand, randn = torch.rand, torch.randn
    inputs = {"query": randn(b, h, m, d).mul(2), "key": randn(b, h, n, d), "value": randn(b, h, n, dv)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    given = dict(case.side)
    gates = {"gate": rand(b, 1, n) * 2, "gate_by_head": rand(b, h, n) * 3, "hard_gate": (rand(b, 1, n) > 0.5).float()}
    for name in set(gates) & set(case.has):
        inputs["gate"] = given["gate"] = gates[name]
    if "phrases" in case.has:
        given["phrases"] = ((rand(b, n) * 9).long() - 4).clamp(min=-1)
    if "protected" in case.has:
        given["protected"] = rand(b, n) > 0.4
    if "active" in case.has:
        given["active"] = torch.arange(b) % 2 == b - 1
    if "heads" in case.has:
        given["heads"] = torch.arange(h) % 2 == 0
    given["seed"] = 77 + torch.arange(b)
    shapes = {"column": (1, 1, 1, n), "batch": (b, 1, 1, n), "full": (b, h, m, n), "pixel": (1, 1, m, n)}
    shapes |= {"heads": (1, h, m, n), "turned": (b, 1, n, m)}
    if case.bias == "-inf":
        inputs["bias"] = torch.where(rand(b, 1, m, n) < 0.3, -float("inf"), 0.0)
        inputs["bias"][0, 0, 5] = -float("inf")
    elif case.bias is not None:
        bias = randn(*shapes[case.bias])
        inputs["bias"] = bias.transpose(2, 3) if case.bias == "turned" else bias
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    side = TokenSide(batch=b, heads_count=h, tokens=n, device=torch.device(device), **on_device)
    return {name: x.to(device) for name, x in inputs.items()}, side


def stored_relevance(query, key, value, side, grad_out, grad_maps) -> Tensor:
    """A * relu(dL/dA), (B, H, M, N), from a map that is stored."""
    kept = {}
    heads = torch.tensor([i in side["heads"] for i in range(query.shape[1])], device=query.device)

    def keep(p, capture, is_head):
        kept["a"] = p
        return captured(p, capture, is_head)

    captured, definition._captured = definition._captured, keep
    try:
        _, maps = reference_attention(
            query.double(), key.double(), value.double().requires_grad_(), FULL, **{**side, "heads": heads},
            capture=Capture((1, 2)),
        )  # fmt: skip
    finally:
        definition._captured = captured
    a = kept["a"].detach().requires_grad_()
    maps = captured(a, Capture((1, 2)), heads)
    loss = ((a @ value.double()) * grad_out).sum() + (maps * grad_maps).sum()
    return a.detach() * torch.autograd.grad(loss, a)[0].relu()
