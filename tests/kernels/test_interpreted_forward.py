"""The Triton kernels of the forward pass, in Triton's interpreter; and what is launched there, compiled for an H100.

`make compile-matrix` compiles all launches, on every Triton and for every target; the machine code that the installed
Triton makes of the kernels is test_compile.py's.
"""

from __future__ import annotations

import pytest
from interpreted import FORWARD, compiled, interpreted

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the run of interpreted_*.py, the file of its launches)"""
    launches = tmp_path_factory.mktemp("interpreted") / "launches.jsonl"
    return interpreted(FORWARD, launches), launches


def test_the_kernels_under_the_interpreter(run):
    """Failures in interpreted_*.py show here."""
    process, _ = run
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"


@pytest.mark.parametrize(
    "version, stage, most", [("installed", "ttir", 100), ("3.6", "ttir", 100), ("3.6", "binary", 15)]
)
def test_what_was_interpreted_compiles(version, stage, most, run, request):
    """Launches that have every kind of argument between them, or as many of these as `most`."""
    triton = ["--triton", str(request.getfixturevalue("triton_of_torch_2_11"))] if version == "3.6" else []
    counts = compiled(run[1], "--stage", stage, "--most", str(most), *triton)
    assert counts["failed"] == 0 and counts["launches"] >= 15
    assert version == "installed" or counts["triton"].startswith(version)
