"""Check what is about to be released: `python release/check.py FOLDER`, or all of it, `make rehearse`.

FOLDER has the built files of both packages. Versions must agree with each other, with --tag and with CHANGELOG.md; each
kind of file is installed in an environment of its own, in which nothing else of ours is, and draws a picture; --readme
runs the README's `make demo` and `make test` in the unpacked source distribution. What took how long is printed: the
time from `pip install` to the first picture on a new machine, but for Python's and the system's own caches.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sdattn_fast", "sdattn_fast_lab")
PROMPT = "a red star left of a blue circle"


def main() -> None:
    """Check, or exit with one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag", help="the version's tag in git, such as v0.1.0; the changelog must have its date")
    parser.add_argument("--readme", action="store_true", help="also the README's commands, in ten minutes")
    options = parser.parse_args()
    version = version_of_release(options.tag)
    wheels = [file_for_here(options.folder, f"{package}-{version}-*.whl") for package in PACKAGES]
    sources = [file_for_here(options.folder, f"{package}-{version}.tar.gz") for package in PACKAGES]
    with tempfile.TemporaryDirectory() as folder:
        for kind, files in (("wheel", wheels), ("sdist", sources)):
            _draw(kind, files, Path(folder, kind))
        if options.readme:
            with tarfile.open(sources[0]) as archive:
                archive.extractall(folder, filter="data")
            unpacked = Path(folder, f"{PACKAGES[0]}-{version}")
            for command in ("demo", "test"):
                _timed(f"sdist: make {command}", ["make", command], unpacked)
            if not (unpacked / "demo/demo.html").exists():
                raise SystemExit("make demo: wrote no demo/demo.html")


def version_of_release(tag: str | None) -> str:
    """The one that all files have. Exits where they differ, or where the changelog has no date for a tag's."""
    found = {
        "sdattn_fast/_version.py": r'^__version__ = "(.*)"$',
        "lab/pyproject.toml": r'^version = "(.*?)"',
        "CITATION.cff": r"^version: (.*)$",
        "CHANGELOG.md": r"^## (\S+) \(\d{4}-\d\d-\d\d\)$" if tag else r"^## (\S+) \(",
    }
    said = {}
    for name, pattern in found.items():
        match = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        said[name] = match[1] if match else "none"
    if tag is not None:
        said["--tag"] = tag.removeprefix("v")
    if len(set(said.values())) > 1:
        raise SystemExit("versions differ: " + ", ".join(f"{name} has {version}" for name, version in said.items()))
    return said["CHANGELOG.md"]


def file_for_here(folder: Path, pattern: str) -> Path:
    """The one file for this machine. Exits where there are none or several."""
    fits = re.compile(rf"(\.tar\.gz|any\.whl|{re.escape(os.uname().machine)}\.whl)$")
    found = [path for path in sorted(folder.glob(pattern)) if fits.search(path.name)]
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one {pattern} for this machine, found {[path.name for path in found]}")
    return found[0].resolve()


def _draw(kind: str, files: list[Path], folder: Path) -> None:
    """Install the files in a new environment, and draw."""
    folder.mkdir()
    _timed(f"{kind}: environment", [sys.executable, "-m", "venv", folder / "env"], folder)
    python, command = folder / "env/bin/python", folder / "env/bin/sdattn-fast"
    what = [f"{PACKAGES[0].replace('_', '-')}[demo] @ {files[0].as_uri()}", str(files[1])]
    constraints = ROOT / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", constraints, *what]
    _timed(f"{kind}: pip install", install, folder)
    _timed(f"{kind}: first sdattn-fast doctor", [command, "doctor"], folder)
    draw = [command, "generate", "--model", "shapes", "--prompt", PROMPT, "--out", "picture.png"]
    for which in ("first", "second"):
        _timed(f"{kind}: {which} picture", draw, folder)
    check = "import sys; from PIL import Image; sys.exit(len(Image.open('picture.png').getcolors(1 << 20)) < 100)"
    _timed(f"{kind}: look at it", [python, "-c", check], folder)


def _timed(name: str, command: list[object], folder: Path) -> None:
    start = time.perf_counter()
    # An environment of ours, and what a checkout puts on the path, would hide what a file lacks.
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    ran = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    print(f"{time.perf_counter() - start:7.1f} s  {name}", flush=True)
    if ran.returncode:
        raise SystemExit(f"{name}: exit status {ran.returncode}\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}")


if __name__ == "__main__":
    main()
