"""Forward plus backward on the CPU, the full program, against the same of plain SDPA and of the compiled reference.

Paired: each round runs all of them in turn. No test asserts a time; `extra_info` has the ratios of medians.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdattn_fast import Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast.backend import cpu
from sdattn_fast.measure.timing import alternate

pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))

# heads, pixels, head dimension
SHAPES = {"sd15-64": (8, 4096, 40), "sd15-32": (8, 1024, 80), "sd15-16": (8, 256, 160), "sd15-8": (8, 64, 160)}
SHAPES |= {"sdxl-64": (10, 4096, 64), "sdxl-32": (20, 1024, 64)}
BATCH, TOKENS = 2, 77
FULL = Program(SalienceDropout(0.2), Refinement(threshold=0.7, sigma=0), "content")


def _inputs(shape: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and the output's gradient, a pixel's heads side by side, as in a UNet."""
    h, m, d = SHAPES[shape]
    query, key, value, grad = (torch.randn(BATCH, n, h, d).to(dtype).transpose(1, 2) for n in (m, TOKENS, TOKENS, m))
    return [x.detach().requires_grad_() for x in (query, key, value)], grad


def _text(content: int) -> dict[str, Tensor]:
    protected = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    protected[:, 1 : 1 + content] = False
    phrases = torch.full((BATCH, TOKENS), -1)
    phrases[:, 2:4], phrases[:, 7:10] = 0, 1
    gate = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(0)) + 0.5
    return {"gate": gate, "phrases": phrases} | ({} if content == TOKENS else {"protected": protected})


def _both_ways(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_against_sdpa(benchmark, shape, dtype):
    inputs, grad = _inputs(shape, dtype)
    texts = {n: _text(n) for n in (15, TOKENS)}
    calls = {"sdpa": _both_ways(F.scaled_dot_product_attention, inputs, grad)}
    for n, text in texts.items():
        calls[f"{n}_content"] = _both_ways(lambda *x, text=text: semantic_attention(*x, FULL, **text), inputs, grad)
    medians = alternate(calls, seconds=2.0 / len(calls))
    benchmark.extra_info["sdpa_ms"] = round(medians["sdpa"] * 1e3, 3)
    for name in list(calls)[1:]:
        benchmark.extra_info[f"{name}_ratio"] = round(medians[name] / medians["sdpa"], 3)
    benchmark.pedantic(calls["15_content"], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("shape", ["sd15-64", "sd15-32", "sd15-16"])
def test_forward_and_backward_against_the_compiled_reference(benchmark, shape):
    inputs, grad = _inputs(shape, torch.float32)
    text = _text(15)
    compiled = torch.compile(lambda *x: semantic_attention(*x, FULL, **text, backend="reference"))
    calls = {
        "reference": _both_ways(compiled, inputs, grad),
        "kernel": _both_ways(lambda *x: semantic_attention(*x, FULL, **text), inputs, grad),
    }
    medians = alternate(calls, seconds=2.0 / len(calls))
    benchmark.extra_info["compiled_reference_ms"] = round(medians["reference"] * 1e3, 3)
    benchmark.extra_info["kernel_ratio"] = round(medians["kernel"] / medians["reference"], 4)
    benchmark.pedantic(calls["kernel"], rounds=5, warmup_rounds=1)
