"""The wheels and the source distribution: what is in them, and that they run where the checkout is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sdattn_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
NOTHING_NEW = "ninja: no work to do"
PIP_WHEEL = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, **environment}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=everything)


def make_wheel(to: Path, of: Path = ROOT, **environment: str) -> tuple[Path, str]:
    """The wheel of a checkout, with what earlier builds compiled; and what the build said."""
    made = run(*PIP_WHEEL, to, of, **environment)
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
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sdattn_fast", "sdattn_fast_command.py"}
    assert not [name for name in names if name.endswith(".safetensors")]
    with_cuda = "without CUDA code" not in said
    assert modules(wheel) == ({"_core", "_cuda"} if with_cuda else {"_core"})


def test_one_wheel_for_all_pythons(built, tmp_path):
    wheel, _ = built
    assert "-cp310-abi3-" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path)
    found = sorted((tmp_path / "sdattn_fast").glob("*.so"))
    assert {path.name.removesuffix(".abi3.so") for path in found} == modules(wheel)
    audit = run(sys.executable, "-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10", "--report", *found)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    pythons = {shutil.which(f"python3.{minor}") for minor in range(10, 20)} - {None}
    # A name on the PATH may be a shim of a version manager that has no such Python.
    pythons = {sys.executable, *(python for python in pythons if run(python, "-c", "").returncode == 0)}
    for python in sorted(pythons):
        ran = run(python, "-c", LOADS, *found)
        assert ran.returncode == 0, f"{python}: {ran.stderr}"


# Without torch: two pixels whose Gaussian is 1 / e, and what bad arguments raise.
LOADS = """
import importlib.util, math, sys
from array import array
from pathlib import Path

modules = {}
for path in sys.argv[1:]:
    name = Path(path).name.split(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(modules[name])

core = modules["_core"]
features, values, out = (array("f", x) for x in ([0, math.sqrt(math.log2(math.e))], [1, 3], [0, 0]))
core.cpu_gaussian_attention((2, 1, 1), *(x.buffer_info()[0] for x in (features, values, out)), 100.0, 1)
assert abs(out[0] - (1 + 3 / math.e)) < 1e-5 and abs(out[1] - (3 + 1 / math.e)) < 1e-5, out
assert core.cpu_info()["isa"] in core.cpu_info()["isas"].split()
bad = [(TypeError,), (IndexError, (1, 1), 0), (TypeError, "sizes", 0), (TypeError, (1, 1, 1, 1, 1, "x"), 0)]
for error, *arguments in bad:
    try:
        core.cpu_packed_bytes(*arguments)
    except error:
        continue
    raise AssertionError(arguments)
assert "_cuda" not in modules or modules["_cuda"].info()["runtime"] >= 12000
"""


def test_without_a_compiler_a_wheel_of_python_alone(tmp_path):
    wheel, said = make_wheel(tmp_path, CXX="/nowhere/c++")
    assert "py3-none-any" in wheel.name and not modules(wheel)
    assert said.count("nothing is compiled, the package is Python alone: there is no C++ compiler: /nowhere/c++") == 1
    refused = run(*PIP_WHEEL, tmp_path, ROOT, CXX="/nowhere/c++", SDATTN_FAST_CPU="1")
    assert refused.returncode
    assert "SDATTN_FAST_CPU is 1, but there is no C++ compiler" in refused.stdout + refused.stderr


def test_the_source_distribution_is_the_repository(tmp_path):
    listed = run("git", "-C", ROOT, "ls-files")
    if listed.returncode:
        pytest.skip("needs a checkout")
    tracked = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    # A copy: the command leaves a folder of its own beside the sources.
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    made = run(sys.executable, "-m", "build", "--sdist", "-o", tmp_path, tmp_path / "tree")
    assert made.returncode == 0, made.stderr[-4000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {member.name.split("/", 1)[1] for member in packed if member.isfile()}
    made_by_setuptools = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made_by_setuptools == tracked


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
