"""Makes what a bare machine with a GPU needs, so that nothing is built or downloaded there: `make gpu-bundle`.

    python benchmarks/on_gpu/bundle.py --architecture 9.0 --to build/gpu-bundle

wheels/: packages that the machine lacks; modules/: the compiled core and the CUDA kernels for its GPU; about.json: of
which commit and of which sources, by which on_gpu.sh knows a bundle that is out of date. Needs a C++ compiler and nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import start

ROOT = start.ROOT
MOST_MIB = 64  # that may travel with the tree
PIP = (sys.executable, "-m", "pip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="9.0", help="the GPU's compute capability; default: 9.0, Hopper")
    parser.add_argument(
        "--wheel", action="append", default=["diffusers", "importlib_metadata"], help="also this package"
    )
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "gpu-bundle")
    options = parser.parse_args()
    to = options.to.resolve()

    wheel = built(options.architecture, to.with_name(f"{to.name}-work"))
    shutil.rmtree(to, ignore_errors=True)
    (to / "modules").mkdir(parents=True)
    with zipfile.ZipFile(wheel) as packed:
        for name in packed.namelist():
            if name.endswith(".so"):
                (to / "modules" / Path(name).name).write_bytes(packed.read(name))
    # These packages alone, in the versions of constraints.txt: what they need is there.
    command = [*PIP, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", to / "wheels"]
    subprocess.run([*command, "-c", ROOT / "constraints.txt", *options.wheel], check=True)
    about = {
        "commit": start.commit(),
        "sources": start.sources(),
        "package": start.python_sources(),
        "architecture": options.architecture,
    }
    (to / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) / 2**20
    for path in sorted(to.rglob("*.*")):
        print(f"{path.stat().st_size / 2**20:7.1f} MiB  {path.relative_to(to)}")
    print(f"{size:7.1f} MiB in all, for compute capability {options.architecture}: {to}")
    if size > MOST_MIB:
        sys.exit(f"more than {MOST_MIB} MiB")


def built(architecture: str, work: Path) -> Path:
    """The package's wheel, from a copy of the sources, so that this tree's own build stays what it is."""
    tree = work / "tree"
    for name in ("csrc", "sdattn_fast", "kernels"):
        shutil.copytree(
            ROOT / name, tree / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    shutil.rmtree(work / "wheel", ignore_errors=True)
    switches = {"SDATTN_FAST_CPU": "1", "SDATTN_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [*PIP, "wheel", "--quiet", "--no-deps", "-w", work / "wheel", tree]
    subprocess.run(command, env={**os.environ, **switches}, check=True)
    (wheel,) = (work / "wheel").glob("*.whl")
    return wheel


if __name__ == "__main__":
    main()
