"""What comes after attention and the UNet's step: backward, compiled and FlexAttention, and what ncu looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdattn_fast.cli.bench import full_program
from sdattn_fast.functional import prepare

from . import record, timing
from .checks import failed_check, of_backend
from .ground import DEVICE, LAYERS, TOKENS, NotRun, describe, prompt_inputs, why_no
from .programs import inputs, prepared

__all__ = ["both_ways", "compiled", "from_python", "launched"]


def both_ways(item: str, shape: str, batch: int) -> None:
    """A call and its backward pass: SDPA, our full program in Triton, the definition, and the definition compiled."""
    why = failed_check("triton", ["full", "backward"], shape)
    if why:
        raise NotRun(why)
    of = describe(shape, batch, torch.float16)
    tensors = tuple(x.detach().requires_grad_() for x in inputs(shape, batch, torch.float16))
    grad = torch.randn_like(tensors[0])
    side = {"batch": batch, "heads_count": LAYERS[shape].num_heads, "tokens": TOKENS, "device": DEVICE}
    definition = prepare(full_program(), **side, **prompt_inputs(batch), backend="reference")
    fused = prepare(full_program(), **side, **prompt_inputs(batch), backend="triton")

    def differentiated(function: Callable[..., Tensor]) -> timing.Call:
        return lambda: torch.autograd.grad(function(*tensors), tensors, grad)

    calls = {
        "sdpa": differentiated(F.scaled_dot_product_attention),
        "triton-full": differentiated(lambda *x: fused(*x)[0]),
        "reference": differentiated(lambda *x: definition(*x)[0]),
    }
    slow = {"reference-compiled": differentiated(torch.compile(lambda *x: definition(*x)[0], dynamic=False))}
    _measured(item, "both ways", calls, slow, of)


@torch.no_grad()
def compiled(item: str, shape: str, batch: int) -> None:
    """What a compiler makes of it: FlexAttention with the gate alone (it can do no more), the definition compiled."""
    of = describe(shape, batch, torch.float16)
    tensors = inputs(shape, batch, torch.float16)
    whole = prepared("full", shape, tensors, "reference")
    calls = {
        "sdpa": lambda: F.scaled_dot_product_attention(*tensors),
        "reference": whole,
    }
    slow = {"flex-gate": _flex_gate(*tensors), "reference-compiled": torch.compile(whole, dynamic=False)}
    if failed_check("triton", ["full"], shape) is None:
        calls["triton-full"] = prepared("full", shape, tensors, "triton")
    _measured(item, "call", calls, slow, of)


@torch.no_grad()
def from_python(item: str, rounds: int = 200) -> None:
    """Microseconds until a layer's call is back in Python, launches and all, while the GPU has next to nothing to do.
    The layers are those of `host_overhead.py`."""
    import host_overhead

    of = {"batch": host_overhead.BATCH, "pixels": host_overhead.SIDE**2, "dtype": "float16"}
    models = {"stock": host_overhead.layers(DEVICE)}
    for backend in ("triton", "cuda"):
        for case in ("program", "program, capture", "program, smoothing"):
            name = f"{backend}: {case}"
            why = why_no(backend)
            if why:
                record.untimed(item, name, why, **of)
            else:
                models[name] = host_overhead.patched(case, backend, DEVICE)
    inputs = host_overhead.inputs(DEVICE)
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 10):
        for name, model in models.items():
            torch.cuda.synchronize()
            microseconds = host_overhead.microseconds(model, inputs)
            if turn >= 10:
                taken[name].append(1e-6 * microseconds)
    timing.write(item, "python", timing.figures(taken, of="stock"), **of)


@torch.no_grad()
def launched(backend: str, program: str, shape: str, batch: int) -> None:
    """One call between cudaProfilerStart and cudaProfilerStop: ncu's --profile-from-start off."""
    of_backend(backend)
    call = prepared(program, shape, inputs(shape, batch, torch.float16), backend)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _measured(
    item: str, mode: str, calls: dict[str, timing.Call], slow: dict[str, timing.Call], of: dict[str, Any]
) -> None:
    """Those that compile for long come in a second table, beside SDPA again: the first is written before they begin."""
    calls = _that_run(item, calls, of)
    timing.write(item, mode, timing.figures(timing.in_turn(calls)), **of)
    again = {"sdpa": calls["sdpa"], **_that_run(item, slow, of)}
    timing.write(item, mode, timing.figures(timing.in_turn(again)), **of)


def _that_run(item: str, calls: dict[str, timing.Call], of: dict[str, Any]) -> dict[str, timing.Call]:
    working = {}
    for name, call in calls.items():
        try:
            call()
            working[name] = call
        except Exception as error:
            record.untimed(item, name, error, **of)
    return working


def _flex_gate(query: Tensor, key: Tensor, value: Tensor) -> timing.Call:
    """The gate with the row renormalised, which is what adding its logarithm to the logits does."""
    from torch.nn.attention.flex_attention import flex_attention

    log_gate = prompt_inputs(len(query))["gate"].log()
    attention = torch.compile(flex_attention, dynamic=False)

    def add(score, b, h, m, n):  # type: ignore[no-untyped-def]
        return score + log_gate[b, n]

    return lambda: attention(query, key, value, score_mod=add)
