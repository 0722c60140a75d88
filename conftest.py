"""Plain `pytest` runs the tests; `pytest --benchmark` runs the suites in benchmarks/ and prints their table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent

# `python -m pytest` puts the root on sys.path, where the folder kernels/ would hide the PyPI package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

# Tests side by side (`make test`: pytest-xdist) share the cores, where each would take all.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the suites in benchmarks/ instead of the tests")
    parser.addoption(
        "--results", metavar="FOLDER", help="with --benchmark: also append the figures to FOLDER/<device>.csv"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    other = ROOT / ("tests" if config.getoption("--benchmark") else "benchmarks")
    return True if other in (collection_path, *collection_path.parents) else None
