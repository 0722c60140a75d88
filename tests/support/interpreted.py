"""tests/kernels/interpreted_*.py in Triton's interpreter, in a process of its own, and the launches that they make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["BACKWARD", "FORWARD", "compiled", "interpreted"]

SUPPORT = Path(__file__).parent
KERNELS = SUPPORT.parent / "kernels"

# About as slow as each other, for two cores.
FORWARD = ("folded", "layouts", "rows", "smooth")
BACKWARD = tuple(
    sorted({path.stem.removeprefix("interpreted_") for path in KERNELS.glob("interpreted_*.py")} - {*FORWARD})
)


def interpreted(names: Iterable[str], launches: Path) -> subprocess.CompletedProcess[str]:
    """Run interpreted_<name>.py of each name; what they launch goes to the file, for `compiled`."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "quick_interpreter", "-p", "recorded_launches", *(f"interpreted_{name}.py" for name in names)]
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT),
        "SDATTN_RECORD_LAUNCHES": str(launches), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    return subprocess.run(command, env=environment, cwd=KERNELS, capture_output=True, text=True)


def compiled(launches: Path, *options: str) -> dict[str, object]:
    """Compile launches for an H100, with options of compile_launches.py; the counts that it prints.

    Raises: AssertionError where one does not compile.
    """
    command = [sys.executable, "compile_launches.py", str(launches), *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, cwd=SUPPORT, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return json.loads(run.stdout.splitlines()[-1])
