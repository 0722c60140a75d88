"""For setup.py: where nvcc is, and for which architectures it compiles. Standard library alone.

nvcc is looked for in CUDA_HOME, on the PATH, and among pip's packages: nvidia-cuda-nvcc, of CUDA 13, with what it needs
beside it. (CUDA 12's pip packages have ptxas and no nvcc.)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEFAULT_ARCHITECTURES", "Architectures", "Nvcc", "NvccMissing", "architectures", "choose", "find"]

DEFAULT_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
OLDEST = 80  # mma.sync on bfloat16
OLDEST_CUDA = 12

_NAMES = {
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
_MEND = "pip install 'nvidia-cuda-nvcc==13.*' 'nvidia-cuda-runtime==13.*', or set CUDA_HOME to a CUDA toolkit"


class NvccMissing(Exception):
    """No nvcc that could compile: the message says what is missing, and how to mend it."""


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that has what it needs: its path, its version, and the static runtime that belongs to it."""

    path: Path
    version: tuple[int, int]
    runtime: Path

    def targets(self) -> set[int]:
        """What it compiles for: 80 for sm_80."""
        printed = subprocess.run([self.path, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        return {int(number) for number in re.findall(r"sm_(\d+)", printed)}


@dataclass(frozen=True)
class Architectures:
    """What is compiled for: by name ("8.0 9.0+PTX"), and nvcc's flags for it."""

    names: str
    flags: tuple[str, ...]


def choose(
    environment: Mapping[str, str] = os.environ, folders: Iterable[str] | None = None
) -> tuple[Nvcc, Architectures] | str:
    """What compiles CUDA code, and for what; or why this build has none. SDATTN_FAST_CUDA says whether it must.

    Raises:
        ValueError: SDATTN_FAST_CUDA is not 0, 1 or auto, or TORCH_CUDA_ARCH_LIST is not what `architectures` takes.
        NvccMissing: SDATTN_FAST_CUDA is 1, and there is no nvcc.
    """
    switch = environment.get("SDATTN_FAST_CUDA") or "auto"
    if switch not in ("0", "1", "auto"):
        raise ValueError(f"SDATTN_FAST_CUDA: expected 0, 1 or auto, got {switch!r}")
    if switch == "0":
        return "SDATTN_FAST_CUDA is 0"
    try:
        found = find(environment, folders)
    except NvccMissing as missing:
        if switch == "1":
            raise NvccMissing(f"SDATTN_FAST_CUDA is 1, but {missing}") from missing
        return str(missing)
    return found, architectures(environment.get("TORCH_CUDA_ARCH_LIST"), found.targets())


def find(environment: Mapping[str, str] = os.environ, folders: Iterable[str] | None = None) -> Nvcc:
    """The nvcc of CUDA_HOME, else of the PATH, else of pip's packages in `folders`.

    `folders` are by default those that Python imports from and the one that pip installs into: build isolation hides
    the second from the first.

    Raises:
        NvccMissing: there is none, or it lacks a part.
    """
    if home := environment.get("CUDA_HOME"):
        path = Path(home, "bin", "nvcc")
        if not path.is_file():
            raise NvccMissing(f"CUDA_HOME is {home}, which has no bin/nvcc: {_MEND}")
        return _whole(path)
    if on_path := shutil.which("nvcc", path=environment.get("PATH", "")):
        return _whole(Path(on_path))
    if folders is None:
        folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in folders:
        for path in sorted(Path(folder or ".").glob("nvidia/*/bin/nvcc"), reverse=True):
            return _whole(path)
    raise NvccMissing(f"there is no nvcc in CUDA_HOME, on the PATH or among pip's packages: {_MEND}")


def architectures(wanted: str | None, targets: set[int]) -> Architectures:
    """TORCH_CUDA_ARCH_LIST as torch reads it: "8.0;9.0+PTX", "8.6 9.0a", "Hopper"; None or "" is the default.

    Of the default, what this nvcc is too old for is left out. So is, of any list, what is older than 8.0.

    Raises:
        ValueError: something is no architecture, this nvcc cannot compile for it, or nothing remains.
    """
    asked = (wanted or "").replace(" ", ";")
    for name, meaning in _NAMES.items():
        asked = asked.replace(name, meaning)
    parts = [_parse(part, wanted) for part in asked.split(";") if part]
    if parts:
        for number, letter, _ in parts:
            if number >= OLDEST and number not in targets:
                known = " ".join(_name(n) for n in sorted(targets) if n >= OLDEST)
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST: this nvcc does not compile for {_name(number)}{letter}, only for {known}"
                )
        parts = [part for part in parts if part[0] >= OLDEST]
    else:
        parts = [(number, "", False) for number, *_ in map(_parse, DEFAULT_ARCHITECTURES.split()) if number in targets]
        parts[-1:] = [(number, letter, True) for number, letter, _ in parts[-1:]]
    if not parts:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected an architecture from 8.0 on, got {wanted!r}")
    flags = []
    for number, letter, ptx in parts:
        flags.append(f"-gencode=arch=compute_{number}{letter},code=sm_{number}{letter}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number}{letter},code=compute_{number}{letter}")
    names = (f"{_name(number)}{letter}{'+PTX' if ptx else ''}" for number, letter, ptx in parts)
    return Architectures(" ".join(dict.fromkeys(names)), tuple(dict.fromkeys(flags)))


def _parse(part: str, wanted: str | None = None) -> tuple[int, str, bool]:
    found = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?", part)
    if found is None:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected a list like '8.0;9.0+PTX', got {wanted!r}, of which {part!r}")
    major, minor, letter, ptx = found.groups()
    return int(major + minor), letter, ptx is not None


def _name(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def _whole(path: Path) -> Nvcc:
    """This nvcc, if it has all that it needs. It says itself where that is: what is on the PATH may be a wrapper."""
    try:
        asked = [str(path), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        ran = subprocess.run(asked, capture_output=True, text=True)
    except OSError as error:
        raise NvccMissing(f"{path} does not run ({error}): {_MEND}") from error
    said = ran.stderr
    version = [re.search(rf"__CUDACC_VER_{part}__=(\d+)", said) for part in ("MAJOR", "MINOR")]
    if ran.returncode or None in version:
        raise NvccMissing(f"{path} --dryrun failed ({said.strip()[-200:]}): {_MEND}")
    major, minor = (int(found[1]) for found in version if found)
    if major < OLDEST_CUDA:
        raise NvccMissing(f"{path} is of CUDA {major}.{minor}, and {OLDEST_CUDA}.0 is the oldest that serves: {_MEND}")
    compiler = re.findall(r"^#\$ CICC_PATH=(.*)$", said, re.MULTILINE)
    headers = re.findall(r'"-I([^"]+)"', said)
    # 13.0's own -L is lib64, and its pip packages have lib.
    libraries = [*re.findall(r'"-L([^"]+)"', said), *(f"{top}/lib" for top in re.findall(r"#\$ TOP=(.*)", said))]
    runtime = _first(libraries, "libcudart_static.a")
    for part, there, package in (
        ("cicc", _first(compiler, "cicc"), "nvidia-nvvm"),
        ("crt/host_config.h", _first(headers, "crt/host_config.h"), "nvidia-cuda-crt"),
        ("cuda_runtime.h", _first(headers, "cuda_runtime.h"), "nvidia-cuda-runtime"),
        ("libcudart_static.a", runtime, "nvidia-cuda-runtime"),
    ):
        if there is None:
            raise NvccMissing(f"{path} has no {part}: pip install '{package}=={major}.{minor}.*', if nvcc is pip's")
    assert runtime is not None
    return Nvcc(path, (major, minor), runtime)


def _first(folders: Iterable[str], name: str) -> Path | None:
    return next((path for folder in folders if (path := Path(folder, name)).is_file()), None)
