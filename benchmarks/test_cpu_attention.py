"""The CPU kernel against torch's scaled_dot_product_attention at the cross-attention shapes of SD 1.5 and SDXL.

Paired: each round times SDPA, the empty program and the whole one (gate, phrases, dropout, NMS, renormalisation) in
turn, so that a busy machine is busy for all of them. No test asserts a time; `extra_info` has the ratios of medians.
Run one instruction set with SDATTN_FAST_ISA=avx2 (or avx512, portable).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from sdattn_fast import Program, Refinement, SalienceDropout
from sdattn_fast.backend import cpu
from sdattn_fast.measure.timing import alternate
from sdattn_fast.plan import RowPlan, TokenSide, make_plan
from sdattn_fast.reference import reference_attention

pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))

# heads, pixels, head dimension
SHAPES = {"sd15-64": (8, 4096, 40), "sd15-32": (8, 1024, 80), "sd15-16": (8, 256, 160)}
SHAPES |= {"sdxl-64": (10, 4096, 64), "sdxl-32": (20, 1024, 64)}
BATCH, TOKENS = 2, 77
FULL = Program(SalienceDropout(0.2), Refinement(threshold=0.7, sigma=0), "content")


def _side(h: int, content: int) -> TokenSide:
    protected = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    protected[:, 1 : 1 + content] = False
    phrases = torch.full((BATCH, TOKENS), -1)
    phrases[:, 2:4], phrases[:, 7:10] = 0, 1
    return TokenSide(
        batch=BATCH,
        heads_count=h,
        tokens=TOKENS,
        device=torch.device("cpu"),
        gate=torch.rand(BATCH, 1, TOKENS, generator=torch.Generator().manual_seed(0)) + 0.5,
        phrases=phrases,
        protected=None if content == TOKENS else protected,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_program_against_sdpa(benchmark, shape, dtype):
    h, m, d = SHAPES[shape]
    query, key, value = (torch.randn(BATCH, h, n, d).to(dtype) for n in (m, TOKENS, TOKENS))
    scale = d**-0.5

    def kernel(rows: RowPlan) -> Callable[[], object]:
        return lambda: cpu.attention(query, key, value, None, scale, rows)

    plans = {f"{n}_content": make_plan(FULL, _side(h, n)).rows for n in (15, 30, TOKENS)}
    calls = {"sdpa": lambda: F.scaled_dot_product_attention(query, key, value)}
    calls["empty"] = kernel(make_plan(Program(), _side(h, 15)).rows)
    calls |= {name: kernel(rows) for name, rows in plans.items()}
    medians = alternate(calls, seconds=2.0 / len(calls))
    benchmark.extra_info["sdpa_ms"] = round(medians["sdpa"] * 1e3, 3)
    for name in list(calls)[1:]:
        benchmark.extra_info[f"{name}_ratio"] = round(medians[name] / medians["sdpa"], 3)
    benchmark.pedantic(calls["15_content"], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("shape", ["sd15-64", "sd15-32", "sd15-16"])
def test_program_against_compiled_reference(benchmark, shape):
    h, m, d = SHAPES[shape]
    query, key, value = (torch.randn(BATCH, h, n, d) for n in (m, TOKENS, TOKENS))
    side = _side(h, 15)
    rows = make_plan(FULL, side).rows
    compiled = torch.compile(reference_attention)

    def reference() -> object:
        return compiled(query, key, value, FULL, gate=side.gate, phrases=side.phrases, protected=side.protected)

    calls = {"sdpa": reference, "kernel": lambda: cpu.attention(query, key, value, None, d**-0.5, rows)}
    medians = alternate(calls, seconds=2.0 / len(calls))
    benchmark.extra_info["compiled_reference_ms"] = round(medians["sdpa"] * 1e3, 3)
    benchmark.extra_info["kernel_ratio"] = round(medians["kernel"] / medians["sdpa"], 4)
    benchmark.pedantic(calls["kernel"], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("tokens", [77, 154, 256])
def test_any_k(benchmark, tokens, ratio):
    """Every token content: k up to 4 by insertion, up to 16 by sorting networks, above by bisection."""
    query, key, value = (torch.randn(BATCH, 8, n, 40) for n in (4096, tokens, tokens))
    side = TokenSide(BATCH, 8, tokens, torch.device("cpu"))
    program = Program(SalienceDropout(ratio), Refinement(threshold=0.7, sigma=0), "content")
    rows, none = make_plan(program, side).rows, make_plan(Program(), side).rows
    calls = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "empty": lambda: cpu.attention(query, key, value, None, 40**-0.5, none),
        "kernel": lambda: cpu.attention(query, key, value, None, 40**-0.5, rows),
    }
    medians = alternate(calls, seconds=2.0 / len(calls))
    benchmark.extra_info["k"] = rows.max_drop
    benchmark.extra_info["kernel_ratio"] = round(medians["kernel"] / medians["sdpa"], 3)
    benchmark.extra_info["of_empty"] = round(medians["kernel"] / medians["empty"], 3)
    benchmark.pedantic(calls["kernel"], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("shape", ["sd15-64", "sdxl-64"])
def test_smooth(benchmark, shape):
    h, m, d = SHAPES[shape]
    x = torch.randn(BATCH, h, m, d)
    benchmark(lambda: cpu.smooth(x, (64, m // 64), 0.8, 1, None))
