"""Makes what a bare machine with a GPU needs, so that nothing is built or downloaded there: `make gpu-bundle`.

    python benchmarks/on_gpu/bundle.py --python python3.12 --architecture 9.0 --to build/gpu-bundle

wheels/: packages that the machine lacks; modules/: the compiled core and the CUDA kernels for its Python and its GPU;
about.json: of which commit and of which sources, by which on_gpu.sh knows a bundle that is out of date. Needs that
Python here, a C++ compiler and nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import start

ROOT = start.ROOT
NEEDED = ("setuptools>=77", "pybind11", "ninja")
MOST_MIB = 64  # that may travel with the tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.12", help="the machine's Python, by the name of one that is here")
    parser.add_argument("--architecture", default="9.0", help="the GPU's compute capability; default: 9.0, Hopper")
    parser.add_argument(
        "--wheel", action="append", default=["diffusers", "importlib_metadata"], help="also this package"
    )
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "gpu-bundle")
    options = parser.parse_args()
    to = options.to.resolve()
    work = to.with_name(f"{to.name}-work")

    python = environment(options.python, work)
    modules = compiled(python, options.architecture, work)
    shutil.rmtree(to, ignore_errors=True)
    (to / "modules").mkdir(parents=True)
    for module in modules:
        shutil.copy(module, to / "modules")
    download(python, options.wheel, to / "wheels")
    about = {
        "commit": start.commit(),
        "sources": start.sources(),
        "package": start.python_sources(),
        "python": version(python),
        "architecture": options.architecture,
    }
    (to / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) / 2**20
    for path in sorted(to.rglob("*.*")):
        print(f"{path.stat().st_size / 2**20:7.1f} MiB  {path.relative_to(to)}")
    print(f"{size:7.1f} MiB in all, for CPython {version(python)} and compute capability {options.architecture}: {to}")
    if size > MOST_MIB:
        sys.exit(f"more than {MOST_MIB} MiB")


def environment(python: str, work: Path) -> Path:
    """A venv of that Python with what the build needs."""
    try:
        version(python)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"--python: {python} does not run here")
    own = work / "venv" / "bin" / "python"
    if not own.exists() or version(own) != version(python):
        subprocess.run([python, "-m", "venv", "--clear", work / "venv"], check=True)
    subprocess.run([own, "-m", "pip", "install", "--quiet", *NEEDED], check=True)
    return own


def version(python: str | Path) -> str:
    return subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


def compiled(python: Path, architecture: str, work: Path) -> list[Path]:
    """The modules, built from a copy of the sources, so that this tree's own build stays what it is."""
    tree, built = work / "tree", work / "built"
    for name in ("csrc", "sdattn_fast", "kernels"):
        shutil.copytree(
            ROOT / name, tree / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    shutil.rmtree(built, ignore_errors=True)
    environment = {**os.environ, "SDATTN_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [python, "setup.py", "--quiet", "build_ext", "--build-lib", built, "--build-temp", work / "objects"]
    subprocess.run(command, cwd=tree, env=environment, check=True)
    return sorted((built / "sdattn_fast").glob("*.so"))


def download(python: Path, names: list[str], to: Path) -> None:
    """Wheels of these packages alone, in the versions of constraints.txt: what they need is there."""
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", to]
    subprocess.run([*command, "-c", ROOT / "constraints.txt", *names], check=True)


if __name__ == "__main__":
    main()
