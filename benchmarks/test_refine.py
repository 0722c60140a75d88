"""Programs that look over the picture, on the CPU: rounds and axis "space", against SDPA and against the reference.

Paired, 15 content tokens of 77, sigma 1. The reference keeps several maps of (B, H, M, N) in float32; the kernel one of
(M, N) a thread. No test asserts a time.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sdattn_fast import Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast.backend import cpu
from sdattn_fast.measure.timing import alternate

pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))

SHAPES = {"sd15-64": (8, 64, 40), "sd15-32": (8, 32, 80), "sd15-16": (8, 16, 160)}  # heads, side, head dimension


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", ["token", "space"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_rounds(benchmark, axis, steps, shape):
    h, side, d = SHAPES[shape]
    query, key, value = (torch.randn(2, h, n, d) for n in (side * side, 77, 77))
    protected = torch.ones(77, dtype=torch.bool)
    protected[1:16] = False
    program = Program(SalienceDropout(0.2, axis=axis), Refinement(steps, 0.5, 1.0, axis), "content")

    def semantic(backend: str) -> object:
        return semantic_attention(
            query, key, value, program, protected=protected.expand(2, -1), grid=(side, side), backend=backend
        )

    calls = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "cpu": lambda: semantic("cpu"),
        "reference": lambda: semantic("reference"),
    }
    medians = alternate(calls, seconds=0)
    benchmark.extra_info["sdpa_ms"] = round(1e3 * medians["sdpa"], 3)
    benchmark.extra_info["share_of_sdpa_ratio"] = round(medians["cpu"] / medians["sdpa"], 3)
    benchmark.extra_info["share_of_reference_ratio"] = round(medians["cpu"] / medians["reference"], 4)
    benchmark.pedantic(lambda: semantic("cpu"), rounds=3)
