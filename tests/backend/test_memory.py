"""The map never exists: peak memory of a fused call does not grow with pixels times tokens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sdattn_fast import Program, Refinement, SalienceDropout

CODE = """
import resource, torch
from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention
torch.manual_seed(0)
program = {program}
def run(m):
    query, key, value = torch.randn(2, 8, m, 8), torch.randn(2, 8, 77, 8), torch.randn(2, 8, 77, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    semantic_attention(query, key, value, program, grid=(m // 64, 64), backend={backend!r}, capture=Capture((1, 2)))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
run(1024)
print(run(16384))
"""
QUERY, MAP = (2 * 8 * 16384 * columns * 4 / 2**20 for columns in (8, 77))


ROWS = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.8), "content")
PICTURE = Program(SalienceDropout(0.2, "space"), Refinement(1, 0.3, 0.8, "space"), "content")
REPEATED = Program(SalienceDropout(0.2), Refinement(3, 0.3, 0.8), "content")


@pytest.mark.parametrize(
    "backend, program, stores_the_map",
    [("cpu", ROWS, False), ("cpu", PICTURE, False), ("reference", ROWS, True)],
    ids=["rows", "picture", "reference"],
)
def test_peak_memory(backend, program, stores_the_map):
    megabytes = _measured(backend, program)
    assert (megabytes > MAP) == stores_the_map
    if not stores_the_map:
        assert megabytes < 4 * QUERY


def test_rounds_keep_one_head_a_thread():
    assert _measured("cpu", REPEATED) < 4 * QUERY + torch.get_num_threads() * MAP / 16


def _measured(backend, program):
    code = CODE.replace("{backend!r}", repr(backend)).replace("{program}", repr(program))
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
