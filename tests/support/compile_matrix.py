"""Compiles what the interpreted tests launch, on every Triton in build/ and the installed one, and for every target.

`make compile-matrix` runs it with the versions. Each Triton takes every launch to its own language (ttir), and to
machine code for sm_90 those that have every kind of argument and option between them; the installed one does the latter
for each other target, and in bfloat16. Prints a line for each run, and the errors; its status is 1 if there are any.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from interpreted import BACKWARD, FORWARD, interpreted

SUPPORT = Path(__file__).parent
BUILD = Path(__file__).parents[2] / "build"
COVER = ["--most", "200"]
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")


def main(versions: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        launches = Path(folder, "launches.jsonl")
        record(launches)
        tritons = [*(["--triton", str(BUILD / f"triton-{version}")] for version in versions), []]
        runs = [[*triton, *depth] for triton in tritons for depth in (["--stage", "ttir"], COVER)]
        runs += [["--target", target, *COVER] for target in TARGETS]
        runs += [["--dtype", "bfloat16", *COVER]]
        red = [run for run in runs if subprocess.run([*python("compile_launches.py"), str(launches), *run]).returncode]
    for run in red:
        print("failed:", *run)
    sys.exit(bool(red))


def record(launches: Path) -> None:
    """Runs the interpreted tests, a file after the other."""
    run = interpreted((*FORWARD, *BACKWARD), launches)
    if run.returncode:
        sys.exit(f"{run.stdout}\n{run.stderr}")


def python(script: str) -> list[str]:
    return [sys.executable, "-W", "ignore", str(SUPPORT / script)]


if __name__ == "__main__":
    main(sys.argv[1:])
