"""The CUDA backend without a GPU: its kernels compiled for the machine of csrc/cuda/emulated_machine.h.

What is compiled stays in build/emulated-cuda, under a hash of everything that went into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from sdattn_fast import backend as backends
from sdattn_fast.backend import cuda

__all__ = ["SOURCES", "CSRC", "CXX", "FLAGS", "why_not", "use", "emulate"]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
# The kernels see shared memory now as this, now as that, which nvcc allows.
FLAGS = [
    "-std=c++17", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi",
    '-DSDATTN_CUDA_ARCHITECTURES="emulated"',
]  # fmt: skip
SOURCES = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "cuda/bindings.cpp", CSRC / "tests/emulated_device.cpp"]
NAME = "_cuda"
PROPERTIES = {"multiprocessors": 132, "shared_per_block": 232448, "major": 9, "minor": 0, "reversed": 0}


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    return None if CSRC.is_dir() and shutil.which(CXX) else f"needs the sources and {CXX}"


def use() -> None:
    """From here on `sdattn_fast.backend.cuda` runs on CPU tensors, in this process."""
    cuda._cuda, cuda._why_not, cuda._device_type = _module(), None, "cpu"
    backends._unavailable.clear()


def emulate(**properties: int) -> None:
    """What the device is, beside a Hopper: multiprocessors, shared_per_block (bytes), major, minor, reversed (1: the
    threads run in the opposite order)."""
    assert not set(properties) - set(PROPERTIES), properties
    ctypes.CDLL(cuda._cuda.__file__).sdattn_emulate(*{**PROPERTIES, **properties}.values())


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, _built())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built() -> Path:
    flags = [*FLAGS, "-fPIC", "-fvisibility=hidden", f"-I{sysconfig.get_path('include')}"]
    version = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    mark = hashlib.sha256("\0".join([version, *flags]).encode())
    for path in sorted({*CSRC.glob("*.h"), *CSRC.glob("cuda/*"), *SOURCES}):
        mark.update(path.name.encode() + b"\0" + path.read_bytes())
    kept = ROOT / "build" / "emulated-cuda"
    module = kept / mark.hexdigest()[:16] / f"{NAME}.abi3.so"
    if module.is_file():
        return module
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as folder:

        def compiled(source: Path) -> str:
            to = f"{folder}/{source.name}.o"
            more = "-O0" if source.name == "bindings.cpp" else "-O1"
            _run(CXX, *flags, more, "-x", "c++", "-c", str(source), "-o", to)
            return to

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, SOURCES))
        _run(CXX, "-shared", *objects, "-o", f"{folder}/{module.name}")
        for old in kept.glob(f"*/{NAME}.*"):
            if old.parent != Path(folder):
                shutil.rmtree(old.parent, ignore_errors=True)
        module.parent.mkdir(exist_ok=True)
        os.replace(f"{folder}/{module.name}", module)
    return module


def _run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stderr[:8000]}")
