"""The kernels as a package for the Hugging Face Hub: `python hub/make.py FOLDER`, or `make hub-package`.

FOLDER becomes a project of Hugging Face's kernel-builder: the files beside this one, and the modules of `sdattn_fast`
that attention needs, copied. Its build/ has what that program would make of it: a folder for each backend, with
metadata that the kernels library checks. Nothing is uploaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from kernels._rust import Build, Digest, DigestAlgorithm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
# Attention without the pipelines: these import PyTorch, Triton and each other.
MODULES = (
    "arguments.py", "backend", "execute.py", "functional.py", "graphs.py", "places.py", "plan.py", "program.py",
    "reference.py", "streams.py",
)  # fmt: skip


def main(folder: Path) -> None:
    """Make the project and its variants in a folder that does not exist yet."""
    if folder.exists():
        raise SystemExit(f"{folder}: expected a new folder, and this one exists")
    ignored = shutil.ignore_patterns("__pycache__", "make.py")
    shutil.copytree(HUB, folder, ignore=ignored)
    Build.open(folder)  # the library's own check of build.toml
    said = tomllib.loads((folder / "build.toml").read_text())
    package = folder / "torch-ext" / said["general"]["name"].replace("-", "_")
    for module in MODULES:
        of_module = ROOT / "sdattn_fast" / module
        if of_module.is_dir():
            shutil.copytree(of_module, package / module, ignore=ignored)
        else:
            shutil.copy(of_module, package / module)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=ignored)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    for backend in said["general"]["backends"]:
        _make_variant(folder, package, backend, said)


def _make_variant(folder: Path, package: Path, backend: str, said: dict[str, Any]) -> None:
    variant = folder / "build" / f"torch-{backend}"
    shutil.copytree(package, variant)
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    # Two versions in one process register their ops under their ids.
    unique = hashlib.sha256(json.dumps(digest.files, sort_keys=True).encode()).hexdigest()[:7]
    archs = {"archs": said["torch-noarch"]["cuda_capabilities"]} if backend == "cuda" else {}
    metadata = {
        "id": f"_{package.name}_{backend}_{unique}",
        **{name: said["general"][name] for name in ("name", "version", "license")},
        "python-depends": [],
        "backend": {"type": backend, **archs},
        "digest": {"algorithm": "sha256", "files": digest.files},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python hub/make.py FOLDER")
    main(Path(sys.argv[1]))
