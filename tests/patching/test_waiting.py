"""No step waits for a GPU: waiting_steps.py, in a process of its own, on a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_no_step_waits() -> None:
    """Failures in waiting_steps.py show here."""
    pytest.importorskip("triton")
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip(f"torch {torch.__version__} guards no GPU that is not there")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "waiting_steps.py"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "support"), "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is used, and hypothesis alone takes seconds to import
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # one that is there would be in the way
    run = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
