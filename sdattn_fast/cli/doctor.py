"""`sdattn-fast doctor`: what is here, what each backend can do, and how to mend what it cannot."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

__all__ = ["doctor", "processor_name"]

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def doctor() -> None:
    """Show versions, devices, and each backend: available, or why not and how to mend it."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from .. import __version__, backends
    from ..backend import cpu
    from ..plan import needs_map

    console = Console()
    ground = Table("what", "found", title=f"sdattn_fast {__version__}")
    ground.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        ground.add_row(name, _version(name))
    ground.add_row("CPU", f"{processor_name()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        ground.add_row(f"GPU {index}", torch.cuda.get_device_name(index))
    if not torch.cuda.device_count():
        ground.add_row("GPU", "none that torch can see")
    for key, value in cpu.info().items():
        ground.add_row(f"core: {key}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    console.print(ground)

    table = Table(
        "backend", "available", "why not, and what mends it", title="Backends, as sdattn_fast.backends() says"
    )
    for name, state in backends().items():
        table.add_row(name, "yes" if state is True else "no", "" if state is True else str(state))
    console.print(table)

    gaps = Table("what", "why", title="Served by the plain torch reference so far (a named backend raises instead)")
    for label, program in _unfused():
        gaps.add_row(label, str(needs_map(program)))
    gaps.add_row("gradients", "the fused kernels have no backward yet")
    console.print(gaps)


def processor_name() -> str:
    """The CPU's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install {name})"


def _unfused():
    from ..program import Program, Refinement, SalienceDropout

    return (
        ("SalienceDropout(axis='space')", Program(SalienceDropout(axis="space"))),
        ("Refinement(axis='space')", Program(refine=Refinement(axis="space"))),
        ("Refinement(steps=2)", Program(refine=Refinement(steps=2))),
    )
