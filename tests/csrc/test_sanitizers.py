"""The C++ core's own tests, under AddressSanitizer and UndefinedBehaviorSanitizer.

Of the instruction sets that this machine has, unless all are asked for, the portable one and the best: they share their
code, and a minute of compiling it goes into each.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chosen_cases import ALL

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-Og", "-g1", "-fno-omit-frame-pointer", "-Wno-psabi", "-ffp-contract=fast"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
SOURCES = {"tests/test_cpu_core.cpp": [], "cpu/attention.cpp": [], "cpu/backward.cpp": [], "cpu/isa_portable.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES["cpu/isa_avx2.cpp"] = ["-mavx2", "-mfma"]
    SOURCES["cpu/isa_avx512.cpp"] = AVX512
    SOURCES["cpu/isa_avx512_bf16.cpp"] = [*AVX512, "-mavx512bf16"]
# What this machine cannot run is linked and never called.
NEEDS = {"cpu/isa_avx2.cpp": "avx2", "cpu/isa_avx512.cpp": "avx512f", "cpu/isa_avx512_bf16.cpp": "avx512_bf16"}
PROCESSOR = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else [*NEEDS.values()]


def _run(*command: object, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **how)  # type: ignore[call-overload]


@pytest.mark.skipif(not CSRC.is_dir() or shutil.which(CXX) is None, reason=f"needs the sources and {CXX}")
def test_core_under_sanitizers(tmp_path):
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
    if _run(CXX, *SANITIZE, tmp_path / "probe.cpp", "-o", tmp_path / "probe").returncode:
        pytest.skip(f"{CXX} has no sanitizers here")
    openmp = (
        ["-fopenmp"] if not _run(CXX, "-fopenmp", tmp_path / "probe.cpp", "-o", tmp_path / "probe").returncode else []
    )

    best = next((source for source, flag in reversed(NEEDS.items()) if flag in PROCESSOR), None)

    def build(source: str) -> Path:
        to = tmp_path / (Path(source).stem + ".o")
        runs = source not in NEEDS or (NEEDS[source] in PROCESSOR and (ALL or source == best))
        sanitized = SANITIZE if runs else ["-O0"]
        built = _run(CXX, *FLAGS, *sanitized, *openmp, *SOURCES[source], "-c", CSRC / source, "-o", to)
        assert built.returncode == 0, built.stderr
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, SOURCES))
    linked = _run(CXX, *SANITIZE, *openmp, *objects, "-o", tmp_path / "test")
    assert linked.returncode == 0, linked.stderr
    tested = _run(tmp_path / "test", env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    assert tested.returncode == 0, tested.stdout[-4000:] + tested.stderr[-4000:]
    assert "all right" in tested.stdout
