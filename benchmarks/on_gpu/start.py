"""Prepares folders, packages and the package itself, then runs on_gpu in them. Needs the standard library alone."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    began = time.monotonic()
    options = parse()
    results, state = options.results.resolve(), options.state.resolve()
    results.mkdir(parents=True, exist_ok=True)
    state.mkdir(parents=True, exist_ok=True)
    package, commit = prepare_package(options.bundle, state)
    path = [package, state / "site", ROOT / "benchmarks", ROOT / "tests" / "support", ROOT / "tests" / "kernels"]
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([*map(str, path), *inherited]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "SDATTN_GPU_BEGAN": str(began),
        "SDATTN_GPU_RESULTS": str(results),
        "SDATTN_GPU_STATE": str(state),
        "SDATTN_GPU_COMMIT": commit,
        "TRITON_CACHE_DIR": str(state / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(state / "inductor"),
        # Asked through NVML, "is there a GPU" does not start CUDA in the process whose forks are to start it.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    if options.dry_run:
        os.environ |= {"SDATTN_GPU_DRY_RUN": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = ["--minutes", str(options.minutes), *(["--list"] if options.list else [])]
    for name in options.only:
        arguments += ["--only", name]
    if options.again:
        arguments += ["--again", str(options.again.resolve())]
    if options.baseline:
        arguments += ["--baseline", str(linked(options.baseline.resolve(), state / "baseline", []))]
    os.chdir(state)
    os.execv(sys.executable, [sys.executable, "-m", "on_gpu", *arguments])


def parse() -> argparse.Namespace:
    gpu_folder = os.environ.get("SDATTN_GPU")
    folder = (
        Path(gpu_folder)
        if gpu_folder
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdattn_fast"
    )
    parser = argparse.ArgumentParser(prog="on_gpu.sh", description="See the head of benchmarks/on_gpu.sh.")
    parser.add_argument("--bundle", type=Path, help="what `make gpu-bundle` made; default: build/gpu-bundle, if there")
    parser.add_argument("--results", type=Path, default=folder / "results", help="default: $SDATTN_GPU/results")
    parser.add_argument(
        "--state", type=Path, default=folder / "state", help="caches and logs; default: $SDATTN_GPU/state"
    )
    parser.add_argument("--minutes", type=float, help="when all is to be over; default: 9, and 60 of a dry run")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only items that begin so; repeatable"
    )
    parser.add_argument(
        "--again", type=Path, metavar="JSONL", help="results of a first call: what did not pass; and ncu"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="TREE", help="with --only: timed in turn with another checkout"
    )
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU, kernels interpreted and emulated")
    parser.add_argument("--list", action="store_true", help="name all items and stop")
    options = parser.parse_args()
    if options.bundle is None and (ROOT / "build" / "gpu-bundle").is_dir():
        options.bundle = ROOT / "build" / "gpu-bundle"
    for name in ("bundle", "again", "baseline"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}: {path} does not exist")
    if options.minutes is None:
        options.minutes = 60 if options.dry_run else 9
    if options.baseline and not options.only:
        parser.error("--baseline: say with --only which items to time beside it")
    return options


def prepare_package(bundle: Path | None, state: Path) -> tuple[Path, str]:
    """Installs the bundle's wheels and links this tree's package with the bundle's compiled modules. Where there is no
    bundle, or one of other sources, with those that an editable install left in the tree. Gives the folder for sys.path
    and the commit."""
    own = sorted((ROOT / "sdattn_fast").glob("*.so"))
    if bundle is None:
        return linked(ROOT, state / "package", own), commit()
    about = json.loads((bundle / "about.json").read_text())
    stale = about.get("sources") != sources()
    if stale:
        print(
            f"on_gpu.sh: the compiled modules of {bundle} are left out: it was compiled from other sources; "
            "`make gpu-bundle` makes it anew",
            file=sys.stderr,
        )
    wheels = sorted(map(str, (bundle / "wheels").glob("*.whl")))
    if wheels and not (state / "site").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--disable-pip-version-check", "--target", str(state / "site"), *wheels], check=True)
    modules = own if stale else sorted((bundle / "modules").glob("*.so"))
    changed = "" if about.get("package") == python_sources() else ", changed since"
    return linked(ROOT, state / "package", modules), about["commit"] + changed


def linked(tree: Path, to: Path, modules: list[Path]) -> Path:
    """A folder in which `sdattn_fast` is that of a tree, without what a build left there, and with these modules."""
    shutil.rmtree(to, ignore_errors=True)
    package = to / "sdattn_fast"
    package.mkdir(parents=True)
    for source in (tree / "sdattn_fast").iterdir():
        if source.suffix != ".so" and source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    (package / "kernels").symlink_to(tree / "kernels")
    for module in modules:
        (package / module.name).symlink_to(module.resolve())
    return to


def sources() -> str:
    """A hash of everything that is compiled."""
    return _hash([ROOT / "setup.py", *(ROOT / "csrc").rglob("*")])


def python_sources() -> str:
    """A hash of the package's Python and Triton."""
    return _hash([*(ROOT / "sdattn_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def _hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file() and p.suffix != ".pyc"):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    ran = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return ran.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
