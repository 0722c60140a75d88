"""benchmarks/on_gpu.sh: what it does, in which order. Python and compute-sanitizer are stubs that note their calls."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "on_gpu.sh"

PYTHON = """#!/usr/bin/env bash
echo "${SDATTN_TEST_BACKEND:-triton} $*" >>"$(dirname "$0")/log"
case $* in
    *get_device_capability*) echo "$DEVICE" ;;
    *unavailable*) echo "$NO_CUDA" ;;
    *purelib*) echo /nowhere ;;
    *"-m pytest"*) [[ -z $RED || $SDATTN_TEST_BACKEND != cuda || $* != *$RED* ]] ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift $((1 + ($# > 1))); done
[[ -z $NO_SANITIZER ]] || { echo "$NO_SANITIZER"; exit 1; }
[[ $* != *"-m pytest"* || $HAZARDS != "${SDATTN_TEST_BACKEND:-triton}" ]] || exit 9
exec "$@"
"""


@pytest.fixture
def on_gpu(tmp_path):
    """on_gpu(*arguments, **environment) -> the run, on a device that was built for, whose kernels are interpreted."""
    state = tmp_path / "state"
    for path, text in ((state / "venv/bin/python", PYTHON), (tmp_path / "bin/compute-sanitizer", SANITIZER)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    (state / "architecture").write_text("9.0\n")
    for stage in ("build", "interpret"):
        (state / f"done-{stage}").touch()

    def run(*arguments, **environment):
        known = {"DEVICE": "9.0", "NO_CUDA": "", "NO_SANITIZER": "", "HAZARDS": "", "RED": "", "PYTHON": "/bin/false"}
        known["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = ["bash", str(SCRIPT), "--state", str(state), "--results", str(tmp_path / "results"), *arguments]
        return subprocess.run(command, env={**os.environ, **known, **environment}, capture_output=True, text=True)

    run.state, run.log = state, state / "venv/bin/log"
    return run


def stages(ran):
    return [
        line.removeprefix("== ") for line in ran.stdout.splitlines() if line.startswith("== ") and " " not in line[3:]
    ]


def test_it_is_bash_and_says_how_it_is_called():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0
    ran = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "Stages, in order: build" in ran.stdout and "set -euo" not in ran.stdout
    ran = subprocess.run(["bash", SCRIPT, "--fast"], capture_output=True, text=True)
    assert ran.returncode == 2 and "unknown option --fast" in ran.stderr


def test_an_unknown_stage_is_said(on_gpu):
    ran = on_gpu("tests")
    assert ran.returncode == 1 and "no stage tests; there are: build interpret test-triton-1" in ran.stderr


def test_without_a_device_nothing_is_measured(on_gpu):
    ran = on_gpu(DEVICE="")
    assert ran.returncode == 3 and "no CUDA device: not measured" in ran.stderr and stages(ran) == []
    assert (on_gpu.state / "done-build").exists(), "a device that is gone for a while undoes nothing"


def test_all_stages_in_order_and_once(on_gpu):
    ran = on_gpu()
    assert ran.returncode == 0, ran.stderr
    done = stages(ran)
    assert done[:8] == [*(f"test-triton-{i}" for i in range(1, 6)), *(f"test-cuda-{i}" for i in range(1, 4))]
    assert done[8:10] == ["sanitize-memcheck-cuda", "sanitize-racecheck-cuda"]
    assert done[10] == "measure-sd15-2-float16" and len(done[10:-2]) == 12
    assert done[-2:] == ["sanitize-memcheck-triton", "sanitize-racecheck-triton"]
    log = on_gpu.log.read_text().splitlines()
    tests = [line.split()[0] for line in log if "-m pytest" in line]
    assert tests == ["triton"] * 5 + ["cuda"] * 5 + ["triton"] * 2
    assert sum("gpu_measure.py --model" in line for line in log) == 12
    again = on_gpu()
    assert again.returncode == 0 and stages(again) == []


def test_it_goes_on_where_it_stopped(on_gpu):
    ran = on_gpu("--minutes", "0")
    assert ran.returncode == 0 and stages(ran) == [] and "go on with test-triton-1" in ran.stdout
    assert stages(on_gpu("test-triton-1", "test-triton-2")) == ["test-triton-1", "test-triton-2"]
    assert stages(on_gpu())[0] == "test-triton-3"


def test_what_cannot_run_has_not_passed(on_gpu):
    ran = on_gpu(NO_CUDA="the CUDA kernels are not built", NO_SANITIZER="Device not supported")
    assert ran.returncode == 4
    assert "test-cuda-1: NOT RUN: the CUDA kernels are not built" in ran.stdout
    assert "sanitize-racecheck-triton: compute-sanitizer does not run here: Device not supported" in ran.stderr
    assert sum("gpu_measure.py --model" in line for line in on_gpu.log.read_text().splitlines()) == 12
    assert not [*on_gpu.state.glob("done-test-cuda*"), *on_gpu.state.glob("done-sanitize*")]
    again = on_gpu()
    assert again.returncode == 4 and stages(again) == [] and "test-cuda-3: the CUDA" in again.stderr
    assert on_gpu("test-cuda-3").returncode == 4, "the others have not run yet"
    assert (on_gpu.state / "done-test-cuda-3").exists() and not (on_gpu.state / "not-run-test-cuda-3").exists()


@pytest.mark.parametrize(
    "what, stage", [({"RED": "any_k or"}, "test-cuda-2"), ({"HAZARDS": "cuda"}, "sanitize-memcheck-cuda")]
)
def test_nothing_is_measured_over_red_cuda_kernels(on_gpu, what, stage):
    ran = on_gpu(**what)
    assert ran.returncode == 1 and stages(ran)[-1] == stage and f"{stage} failed" in ran.stderr
    ran = on_gpu("measure-sd15-2-float16")
    assert ran.returncode == 1 and f"{stage} has not passed" in ran.stderr
    assert "gpu_measure.py" not in on_gpu.log.read_text()


def test_hazards_in_tritons_kernels_are_red_after_all_was_measured(on_gpu):
    ran = on_gpu(HAZARDS="triton")
    assert ran.returncode == 1 and "sanitize-memcheck-triton failed" in ran.stderr
    assert "measure-sdxl-16-bfloat16" in stages(ran)


def test_another_device_is_built_for(on_gpu):
    on_gpu()
    ran = on_gpu(DEVICE="12.0")
    assert ran.returncode == 1 and stages(ran) == ["build"]
    assert not list(on_gpu.state.glob("done-*"))
