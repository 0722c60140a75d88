"""What this is measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess

import torch

from . import record, timing
from .ground import DEVICE, DRY

__all__ = ["facts"]


def facts() -> None:
    """Appends the "run" line: device, driver, versions, the copy's bandwidth, a matrix product's rate."""
    import triton

    import sdattn_fast

    name = "none: a dry run on the CPU" if DRY else torch.cuda.get_device_name()
    facts_of_run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "dry_run": DRY,
        "commit": os.environ.get("SDATTN_GPU_COMMIT", "unknown"),
        "sdattn_fast": sdattn_fast.__version__,
        "backends": {k: v if v is True else record.without_paths(str(v)) for k, v in sdattn_fast.backends().items()},
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "diffusers": _version("diffusers"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "copy_tb_per_s": round(timing.bandwidth() / 1e12, 3),
        "matmul_tflops": round(_matmul() / 1e12, 1),
        "nvidia_smi": _nvidia_smi(),
    }
    record.append("run", **facts_of_run)
    print(", ".join(f"{key}: {x}" for key, x in facts_of_run.items()))


def _matmul() -> float:
    """Operations a second of a large product in float16."""
    n = 64 if DRY else 8192
    x, y = (torch.randn(n, n, device=DEVICE).to(torch.float32 if DRY else torch.float16) for _ in range(2))
    times = timing.in_turn({"matmul": lambda: x @ y}, rounds=5, sample=0.0)["matmul"]
    return 2 * n**3 / sorted(times)[len(times) // 2]


def _nvidia_smi() -> str:
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
    try:
        ran = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return ran.stdout.strip() or "none"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
