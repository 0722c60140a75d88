"""What `warm_up` saves of the first picture: the kernels of SD 1.5's layers, forward and backward, compiled for sm_90
one after another, as the first picture would, and by `warm_up`. No GPU is needed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = ((64, 40), (32, 80), (16, 160), (8, 160))  # height and width, channels of a head
SUPPORT = Path(__file__).parents[1] / "tests/support"


def test_warm_up(benchmark):
    figures = {"in turn": [], "warm_up": []}
    for _ in range(3):
        for how, seconds in figures.items():
            count, took = _compile(how)
            seconds.append(took)
    in_turn, warm_up = (statistics.median(seconds) for seconds in figures.values())
    benchmark.extra_info["kernels"] = int(count)
    benchmark.extra_info["cores"] = os.cpu_count()
    benchmark.extra_info["in_turn_s"], benchmark.extra_info["warm_up_s"] = round(in_turn, 2), round(warm_up, 2)
    benchmark.extra_info["warm_up_ratio"] = round(warm_up / in_turn, 3)
    benchmark.pedantic(lambda: None, rounds=1)


def _compile(how: str) -> list[float]:
    """How many kernels, and seconds, in a process of its own with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {"TRITON_CACHE_DIR": folder, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, how]
        run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    return [float(number) for number in run.stdout.split()]


def _main(how: str) -> None:
    import fake_gpu
    import torch
    from recorded_launches import on_an_h100

    from sdattn_fast import Program, Refinement, SalienceDropout, semantic_attention
    from sdattn_fast.backend.triton import compile_ahead, gpu

    fake_gpu.use("sm_90")
    gpu.interprets = lambda: True  # so that CPU tensors are served
    program = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0), "content")
    protected = torch.arange(77).expand(2, 77) > 12
    with on_an_h100(), compile_ahead.planned() as launches:
        for size, d in SHAPES:
            query, key, value = (
                torch.zeros(2, rows, 8, d, dtype=torch.float16).transpose(1, 2) for rows in (size * size, 77, 77)
            )
            for needs_grad in (False, True):
                query.requires_grad_(needs_grad)
                out = semantic_attention(query, key, value, program, protected=protected, backend="triton")
                if needs_grad:
                    out.backward(out.detach())
    start = time.perf_counter()
    if how == "in turn":
        for one in launches:
            compile_ahead.compile_one(one)
    else:
        assert all(compile_ahead.compiled(launches))
    print(len(launches), time.perf_counter() - start)


if __name__ == "__main__":
    _main(sys.argv[1])
