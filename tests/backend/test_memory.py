"""The map never exists: peak memory of a fused call does not grow with pixels times tokens."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention
torch.manual_seed(0)
program = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.8), "content")
def run(m):
    query, key, value = torch.randn(2, 8, m, 8), torch.randn(2, 8, 77, 8), torch.randn(2, 8, 77, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    semantic_attention(query, key, value, program, grid=(m // 64, 64), backend={backend!r}, capture=Capture((1, 2)))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
run(1024)
print(run(32768))
"""
QUERY, MAP = (2 * 8 * 32768 * columns * 4 / 2**20 for columns in (8, 77))


@pytest.mark.parametrize("backend, stores_the_map", [("cpu", False), ("reference", True)])
def test_peak_memory(backend, stores_the_map):
    done = subprocess.run(
        [sys.executable, "-c", CODE.replace("{backend!r}", repr(backend))], capture_output=True, check=True
    )
    megabytes = float(done.stdout)
    assert (megabytes > MAP) == stores_the_map
    if not stores_the_map:
        assert megabytes < 4 * QUERY
