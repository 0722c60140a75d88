"""benchmarks/on_gpu.sh without a GPU: one item's fault costs that item, and everything is written down."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from old_triton import skip_without_interpreter

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def on_gpu(results, *options, script=SCRIPT, **environment):
    """(the run, its results by item, all its records)"""
    command = ["bash", str(script), "--results", str(results), "--state", str(results / "state"), *options]
    ran = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable} | environment, capture_output=True, text=True
    )
    lines = (results / "results.jsonl").read_text().splitlines() if (results / "results.jsonl").exists() else []
    records = [json.loads(line) for line in lines]
    return ran, {r["item"]: r for r in records if r["kind"] == "item"}, records


def test_it_says_how_it_is_called():
    ran = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "Phases, in order: facts" in ran.stdout and "set -euo" not in ran.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (["--fast"], "unrecognized arguments: --fast"),
        (["--bundle", "/nowhere"], "--bundle: /nowhere does not exist"),
        (["--baseline", "."], "say with --only"),
        (["--dry-run", "--only", "tests"], "no item begins with 'tests'; there are: facts, check/triton/full/"),
    ],
)
def test_what_it_cannot_do_is_said(tmp_path, options, words):
    ran, items, _ = on_gpu(tmp_path, *options)
    assert ran.returncode == 2 and words in ran.stderr and not items


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_nothing_is_measured(tmp_path):
    ran, items, _ = on_gpu(tmp_path, "--only", "facts")
    assert ran.returncode == 3 and "no CUDA device: not measured" in ran.stderr
    assert items["facts"]["status"] == "failed" and set(items) == {"facts"}


RUNNER = """
import os, signal, subprocess, sys, time
from on_gpu import record, runner
from on_gpu.ground import NotRun
from on_gpu.items import Item, Phase

def passes(): print("all is well")
def fails(): raise AssertionError("out is off by 0.5, see /home/me/tree/kernels/rows.py")
def dies(): os.kill(os.getpid(), signal.SIGSEGV)
def hangs():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    subprocess.run(["sleep", "298.76"])
def is_not_here(): raise NotRun("the CUDA kernels are not built")
def no_tool(): raise NotRun("there is no ncu")

runner.GRACE = 0.5
items = [Item(f.__name__, 1, f) for f in (passes, fails, dies, hangs, is_not_here)]
items.append(Item("no_tool", 5, command=no_tool))
command = [sys.executable, "-c", "import os; print(os.environ['X'])"]
items.append(Item("command", 5, command=lambda: command, environment={"X": "3 passed"}))
runner.run_phase(Phase("some", 60, items, int(sys.argv[1])), time.monotonic() + 60)
runner.run_phase(Phase("late", 60, [Item("late", 5, passes)]), time.monotonic())
"""


@pytest.mark.parametrize("side_by_side", [1, 7])
def test_what_becomes_of_each_item_is_written_down(tmp_path, side_by_side):
    folders = {"SDATTN_GPU_RESULTS": str(tmp_path), "SDATTN_GPU_STATE": str(tmp_path)}
    environment = {**os.environ, **folders, "PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-c", RUNNER, str(side_by_side)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    became = {r["item"]: (r["status"], r.get("lines", [""])[-1]) for r in records}
    assert became == {
        "passes": ("passed", ""),
        "fails": ("failed", "AssertionError: out is off by 0.5, see rows.py"),
        "dies": ("failed", "ended by signal 11"),
        "hangs": ("timed out", "not through after 1 s"),
        "is_not_here": ("not run", "the CUDA kernels are not built"),
        "no_tool": ("not run", "there is no ncu"),
        "command": ("passed", "3 passed"),
        "late": ("not run", "no time was left for it"),
    }
    assert side_by_side > 1 or [r["item"] for r in records][:4] == ["passes", "fails", "dies", "hangs"]
    assert not running("sleep", "298.76"), "what an item started ends with it"


def running(*command):
    """Whether a process with this command line is there."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if path.read_bytes() == "".join(f"{word}\0" for word in command).encode():
                return True
    return False


def test_a_broken_kernel_costs_its_own_check_and_times(tmp_path):
    """In a copy of the tree, run dry: the smoothing is wrong, and the kernel that looks over the picture crashes."""
    skip_without_interpreter()
    tree = tmp_path / "tree"
    for name in ("benchmarks", "csrc", "kernels", "sdattn_fast", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    for kernel, right, wrong in (
        ("smooth", "(total / weights)", "(1.5 * total / weights)"),
        ("refine", "import triton\n", "import os\nimport signal\n\nimport triton\n"),
        ("refine", '    if STAGE == "begin"', '    os.kill(os.getpid(), signal.SIGSEGV)\n    if STAGE == "begin"'),
    ):
        path = tree / "kernels" / f"{kernel}.py"
        assert right in path.read_text()
        path.write_text(path.read_text().replace(right, wrong, 1))

    only = ["check/triton/picture/sd15-64x64", "times/float16/sd15-64x64/2"]
    options = [word for name in only for word in ("--only", name)]
    script = tree / "benchmarks" / "on_gpu.sh"
    # Without a compiler for the emulated machine: the CUDA kernels are not there.
    ran, items, records = on_gpu(tmp_path / "results", "--dry-run", *options, script=script, CXX="/nowhere/c++")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    failed = {name for name, r in items.items() if r["status"] == "failed"}
    assert failed == {"check/triton/smooth/sd15-64x64", "check/triton/readme/sd15-64x64", only[0]}, ran.stdout
    assert items[only[0]]["lines"][-1] == "ended by signal 11"
    assert any("Mismatched elements" in line for line in items["check/triton/smooth/sd15-64x64"]["lines"])
    assert items["check/triton/full/sd15-64x64"]["status"] == items[only[1]]["status"] == "passed"
    assert items["check/cuda/full/sd15-64x64"]["status"] == "not run"

    timed = {r["contestant"] for r in records if r["kind"] == "figure"}
    untimed = {r["contestant"]: r["why"] for r in records if r["kind"] == "untimed" and r.get("how") != "graph"}
    assert timed >= {"sdpa", "attend-and-excite", "hooks", "triton-full"}
    assert untimed["triton-readme"] == "check/triton/readme/sd15-64x64: failed" and "triton-readme" not in timed
    assert "needs the sources and" in untimed["cuda-full"]
    assert f"failed: {only[0]}: ended by signal 11" in ran.stdout
    assert (tmp_path / "results" / "logs.tar.gz").stat().st_size
    assert str(tmp_path) not in (tmp_path / "results" / "results.jsonl").read_text()


SUITE = """
import pytest

@pytest.mark.parametrize("i", range(6))
def test(i):
    if i == 0:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_a_lost_context_costs_its_own_test(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "on_gpu.suite", "-n", "1", "-rA", "test_it.py"]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT / "benchmarks")
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout.count("PASSED test_it.py") == 5 and "an illegal memory access" in ran.stdout, ran.stdout


def test_a_second_call_runs_what_had_not_passed_and_what_that_needs(tmp_path, monkeypatch):
    items = importlib.import_module("on_gpu.items")
    needs = frozenset({"check/a"})
    every = [
        items.Phase("facts", 9, [items.Item("facts", 9)]),
        items.Phase("check", 9, [items.Item("check/a", 9), items.Item("check/b", 9)]),
        items.Phase("times", 9, [items.Item("times/1", 9, needs=needs), items.Item("times/2", 9, needs=needs)]),
    ]
    before = tmp_path / "before.jsonl"
    statuses = {
        "facts": "passed",
        "check/a": "passed",
        "check/b": "passed",
        "times/1": "passed",
        "times/2": "timed out",
    }
    lines = [json.dumps({"kind": "item", "item": name, "status": status}) for name, status in statuses.items()]
    before.write_text("\n".join([*lines, '{"kind": "item", "it']))  # cut off

    def names(phases):
        return [item.name for phase in phases for item in phase.items]

    assert names(items.wanted(every, [], before)) == ["facts", "check/a", "times/2"]
    assert names(items.wanted(every, ["times/1"], None)) == ["facts", "check/a", "times/1"]
    assert names(items.wanted(every, [], None)) == names(every)

    monkeypatch.setenv("PYTHONPATH", f"/now{os.pathsep}/rest")
    times = items.beside(items.wanted(every, ["times/1"], None), Path("/before"))[-1].items
    assert [item.name.split("@")[1] for item in times] == ["baseline-1", "now-1", "baseline-2", "now-2"]
    assert (
        times[0].environment["PYTHONPATH"] == f"/before{os.pathsep}/rest" and "PYTHONPATH" not in times[1].environment
    )


def test_a_bundle_of_other_sources_is_left_out(tmp_path, capsys):
    start = importlib.import_module("on_gpu.start")
    bundle = tmp_path / "bundle"
    (bundle / "modules").mkdir(parents=True)
    (bundle / "modules" / "_core.so").touch()
    good = {"commit": "abc", "sources": start.sources(), "package": start.python_sources()}
    for wrong, words in (({}, ""), ({"sources": "0"}, "other sources")):
        (bundle / "about.json").write_text(json.dumps(good | wrong))
        package, commit = start.prepare_package(bundle, tmp_path / "state")
        assert commit == "abc" and (package / "sdattn_fast" / "_core.so").exists() == (not wrong)
        assert words in capsys.readouterr().err
        assert (package / "sdattn_fast" / "kernels" / "rows.py").exists()
    (bundle / "about.json").write_text(json.dumps(good | {"package": "0"}))
    assert start.prepare_package(bundle, tmp_path / "state")[1] == "abc, changed since"
