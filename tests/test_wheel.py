"""The wheels: what is in them, and that the kernels' may be repaired and runs where the checkout is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sdattn_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
NOTHING_NEW = "ninja: no work to do"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, **environment}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=everything)


def make_wheel(to: Path, of: Path = ROOT, **environment: str) -> tuple[Path, str]:
    """The wheel of a checkout, with what earlier builds compiled; and what the build said."""
    made = run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", to, of, **environment)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    (wheel,) = to.glob("*.whl")
    return wheel, made.stdout + made.stderr


def modules(wheel: Path) -> set[str]:
    return {Path(name).name.split(".")[0] for name in zipfile.ZipFile(wheel).namelist() if ".so" in Path(name).suffixes}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    wheel, said = make_wheel(tmp_path_factory.mktemp("wheel"))
    # Once more where the sources are newer than the installed package: what is built must not be built again.
    return (wheel, said) if NOTHING_NEW in said else make_wheel(tmp_path_factory.mktemp("again"))


def test_wheel_holds_all_that_is_needed(built):
    wheel, said = built
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {"py.typed", "backend/measured.json"}
    assert {"sdattn_fast/kernels/rows.py", *(f"sdattn_fast/{name}" for name in data)} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sdattn_fast"}
    assert not [name for name in names if name.endswith(".safetensors")]
    with_cuda = "without CUDA code" not in said
    assert modules(wheel) == ({"_core", "_cuda"} if with_cuda else {"_core"})


def test_wheel_of_the_lab_holds_all_weights(tmp_path):
    lab = tmp_path / "lab"
    # A copy: what an earlier build left in lab/build goes into the wheel.
    shutil.copytree(ROOT / "lab", lab, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    # Python leaves these where the package was imported from, and they are no weights.
    (lab / "src/sdattn_fast_lab/__pycache__").mkdir(exist_ok=True)
    (lab / "src/sdattn_fast_lab/__pycache__/left.pyc").touch()
    package = ROOT / "lab" / "src" / "sdattn_fast_lab"
    wanted = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert sum(name.endswith(".safetensors") for name in wanted) >= 4

    wheel, said = make_wheel(tmp_path / "wheel", lab)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "absent from the `packages` configuration" not in said


def test_the_lab_has_the_version_and_the_licence_of_the_kernels():
    (version,) = re.findall(r'^version = "(.+?)"', (ROOT / "lab" / "pyproject.toml").read_text(), re.MULTILINE)
    assert version == __version__
    assert (ROOT / "lab" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_nothing_is_compiled_twice(built):
    _, said = built
    assert NOTHING_NEW in said
    assert "absent from the `packages` configuration" not in said


# Away from the checkout: -I, and a folder of its own. torch comes from this environment's packages through a .pth file;
# an editable install there does not come along, its own .pth file is not read.
RUNS = """
import json, sys
import torch
import sdattn_fast
from sdattn_fast import Program, Refinement, SalienceDropout, semantic_attention

torch.manual_seed(0)
query, key, value = torch.randn(2, 4, 64, 40), torch.randn(2, 4, 77, 40), torch.randn(2, 4, 77, 40)
protected = torch.zeros(2, 77, dtype=torch.bool)
protected[:, 0] = protected[:, 12:] = True
program = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.8), "content")
how = dict(protected=protected, grid=(8, 8))
fast = semantic_attention(query, key, value, program, backend="cpu", **how)
true = semantic_attention(query.double(), key.double(), value.double(), program, backend="reference", **how)
found = {"file": sdattn_fast.__file__, "backends": sdattn_fast.backends(), "error": (fast - true).abs().max().item()}
if sys.argv[1] == "_cuda":
    from sdattn_fast import _cuda
    found["cuda"] = _cuda.__file__
print(json.dumps(found))
"""


def test_wheel_runs_in_a_clean_environment(built, tmp_path):
    wheel, _ = built
    made = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    assert made.returncode == 0, made.stderr
    python = tmp_path / "venv" / "bin" / "python"
    put = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    assert put.returncode == 0, put.stdout + put.stderr
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    (tmp_path / "runs.py").write_text(RUNS)
    which = "_cuda" if "_cuda" in modules(wheel) else "no _cuda"
    ran = run(python, "-I", tmp_path / "runs.py", which, CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(site)
    assert found["error"] < 1e-5
    assert found["backends"]["cpu"] is True
    # Without a device "cuda" says why not, and its module loads without a driver all the same.
    assert isinstance(found["backends"]["cuda"], str) and found["backends"]["cuda"]
    assert which == "no _cuda" or Path(found["cuda"]).is_relative_to(site)


def test_repair_leaves_libgomp_to_torch(built, tmp_path):
    pytest.importorskip("auditwheel")
    wheel, _ = built
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", tmp_path, wheel]
    ran = run(*repair, PATH=path)
    assert ran.returncode == 0, ran.stderr
    (repaired,) = tmp_path.glob("*manylinux*.whl")
    assert modules(repaired) == modules(wheel)


def test_without_nvcc_a_wheel_for_cpus_and_one_line(built, tmp_path):
    wheel, said = make_wheel(tmp_path, SDATTN_FAST_CUDA="auto", CUDA_HOME="/nowhere")
    assert modules(wheel) == {"_core"}
    assert said.count("sdattn_fast: built for CPUs alone, without CUDA code: CUDA_HOME is /nowhere") == 1
