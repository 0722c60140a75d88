"""A GPU that Triton compiles for and launches on, but that is not there: launches are listed and nothing runs.

Everything on the way to a launch is Triton's own: how arguments are specialised, the cache's key, the compiler to the
last stage, the grid. Imports nothing but triton, any version of it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["SHARED_KIB", "launches", "target", "use"]

SHARED_KIB = {
    80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99,
    "gfx90a": 64, "gfx942": 64, "gfx950": 160, "gfx1100": 64, "gfx1201": 64,
}  # that a block may have  # fmt: skip

launches: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = []  # kernel, grid, arguments by their names


def target(name: str) -> GPUTarget:
    """The target called "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 32 if name.startswith(("gfx11", "gfx12")) else 64)


def use(name: str) -> None:
    """From here on Triton compiles for this target and launches nowhere."""
    driver.set_active(_Driver(target(name)))


class _Driver:
    def __init__(self, of: GPUTarget) -> None:
        self._target = of
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_KIB[of.arch] * 1024},
            # module, function, registers, spills and, of newer versions, the most threads
            load_binary=lambda name, *rest: ("module", name, 0, 0, 1024) if _newer() else ("module", name, 0, 0),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        # Before 3.3 a launcher is handed no constants: its source has them.
        older = _version() < (3, 3)
        self._names = [p.name for p in source.fn.params if not (older and p.is_constexpr)]
        self._constants = {p.name: source.constants[p.name] for p in source.fn.params if older and p.is_constexpr}

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        arguments = dict(zip(self._names, rest[-len(self._names) :], strict=True)) | self._constants
        launches.append((function, (x, y, z), arguments))


def _newer() -> bool:
    """Whether Triton reads the most threads of a block from the driver."""
    return _version() >= (3, 4)


def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])
