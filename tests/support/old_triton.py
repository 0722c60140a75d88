"""What the oldest Tritons that are supported cannot do."""

from __future__ import annotations

import re
import subprocess

import machine_code
import pytest

__all__ = ["skip_unless_cuda_13_is_read", "skip_without_interpreter"]


def skip_unless_cuda_13_is_read() -> None:
    """nvdisasm of CUDA 12.4, in Triton 3.2's wheel, does not know the files of nvcc 13."""
    said = subprocess.run([machine_code.tool("nvdisasm"), "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release (\d+)\.(\d+)", said.stdout)
    assert release is not None
    if (int(release[1]), int(release[2])) < (12, 8):
        pytest.skip("triton's nvdisasm is older than nvcc")


def skip_without_interpreter() -> None:
    """Before Triton 3.4 the interpreter writes beyond tensors of int32, or fails."""
    pytest.importorskip("triton")
    from sdattn_fast.backend.triton import gpu, launch

    if launch.version() < gpu.OLDEST_INTERPRETER:
        pytest.skip(f"the interpreter of triton {launch.version()} is not right: `gpu.availability`")
