"""tests/kernels/interpreted_*.py in Triton's interpreter, in a process of its own, and the launches that they make.

`Interpreted` has the tests of one part of the files; test_interpreted_*.py derive from it, each for a core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from chosen_cases import ALL
from old_triton import skip_without_interpreter

__all__ = ["BACKWARD", "FORWARD", "Interpreted", "interpreted"]

SUPPORT = Path(__file__).parent
KERNELS = SUPPORT.parent / "kernels"

# About as slow as each other, for two cores.
FORWARD = ("folded", "layouts", "rows", "smooth")
BACKWARD = tuple(
    sorted({path.stem.removeprefix("interpreted_") for path in KERNELS.glob("interpreted_*.py")} - {*FORWARD})
)


class Interpreted:
    """`make compile-matrix` compiles all launches, on every Triton and for every target; the machine code that the
    installed Triton makes of the kernels is test_compile.py's."""

    names: tuple[str, ...]

    @pytest.fixture(scope="class")
    def run(self, request, tmp_path_factory):
        """(the run of interpreted_*.py, the file of its launches)"""
        skip_without_interpreter()
        launches = tmp_path_factory.mktemp("interpreted") / "launches.jsonl"
        return interpreted(request.cls.names, launches), launches

    def test_the_kernels_under_the_interpreter(self, run):
        """Failures in interpreted_*.py show here."""
        process, _ = run
        assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"

    @pytest.mark.parametrize(
        "version, stage, most, least",
        [*([("installed", "ttir", 100, 30)] if ALL else []), ("3.6", "ttir", 60, 30), ("3.6", "binary", 15, 15)],
    )
    def test_what_was_interpreted_compiles(self, version, stage, most, least, run, request):
        """For an H100. Launches that have every kind of argument between them, or as many of these as `most`. The
        installed Triton compiles all kernels in test_compile.py; these launches, too, where all cases are tested."""
        triton = ["--triton", str(request.getfixturevalue("triton_of_torch_2_11"))] if version == "3.6" else []
        counts = _compiled(run[1], "--stage", stage, "--most", str(most), *triton)
        assert counts["failed"] == 0 and counts["launches"] >= least, counts
        assert version == "installed" or counts["triton"].startswith(version), counts


def interpreted(names: Iterable[str], launches: Path) -> subprocess.CompletedProcess[str]:
    """Run interpreted_<name>.py of each name; what they launch goes to the file."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "quick_interpreter", "-p", "recorded_launches", *(f"interpreted_{name}.py" for name in names)]
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT),
        "SDATTN_RECORD_LAUNCHES": str(launches), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    return subprocess.run(command, env=environment, cwd=KERNELS, capture_output=True, text=True)


def _compiled(launches: Path, *options: str) -> dict[str, Any]:
    """Compile launches, with options of compile_launches.py; the counts that it prints."""
    command = [sys.executable, "compile_launches.py", str(launches), *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, cwd=SUPPORT, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return json.loads(run.stdout.splitlines()[-1])
