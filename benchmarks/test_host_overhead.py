"""Microseconds of Python that a patched layer costs at every step, against stock; `host_overhead.py` says of what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("diffusers")


def test_a_layer(benchmark):
    def overhead() -> dict[str, dict[str, float]]:
        script = Path(__file__).with_name("host_overhead.py")
        return json.loads(subprocess.run([sys.executable, script], capture_output=True, check=True).stdout)

    benchmark.extra_info["rows"] = benchmark.pedantic(overhead, rounds=1)
