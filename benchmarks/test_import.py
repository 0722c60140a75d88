"""What `import sdattn_fast` costs over `import torch`: the aim is 0.2 s."""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time, torch
start = time.perf_counter()
import sdattn_fast
print(time.perf_counter() - start)
"""


def test_import_time(benchmark):
    def seconds() -> float:
        return float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True).stdout)

    benchmark.extra_info["over_torch_s"] = round(statistics.median(seconds() for _ in range(5)), 4)
    benchmark.pedantic(seconds, rounds=1)
