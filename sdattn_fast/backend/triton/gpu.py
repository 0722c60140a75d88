"""Which GPUs the Triton kernels run on, and what launches have to know of one."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ..devices import gpu_index
from . import launch

__all__ = [
    "COMPILED_FOR", "OLDEST_INTERPRETER", "RUN_ON", "availability", "bounds_registers", "interprets", "num_sms",
    "precision", "remark",
]  # fmt: skip

_OLDEST_TRITON = (3, 2)  # of torch 2.6
OLDEST_INTERPRETER = (3, 4)
# What `make compile-matrix` compiles for, and where benchmarks/on_gpu.sh passed its tests (benchmarks/results).
COMPILED_FOR = (
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201",
)  # fmt: skip
RUN_ON: tuple[str, ...] = ("sm_90",)


def availability(device: torch.device | None = None) -> str | None:
    """None where the kernels can run on a device, torch's current one by default, else the reason and how to fix it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (torch's CUDA wheels for Linux bring it)"
    have = ".".join(map(str, launch.version()))
    if interprets():
        if launch.version() < OLDEST_INTERPRETER:
            return f"the interpreter of triton {have} writes beyond tensors of int32, or fails; it is right from 3.4 on"
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    if launch.version() < _OLDEST_TRITON:
        return f"triton {have} is older than 3.2, the oldest that the kernels compile with"
    return _refusal_of_device(gpu_index(device))


def remark(device: torch.device | None = None) -> str | None:
    """What is to be known of these kernels on a device where they are available, or None."""
    if interprets():
        return None
    architecture = _architecture(gpu_index(device))
    if architecture in RUN_ON:
        return None
    tested = "compiled in the tests" if architecture in COMPILED_FOR else "not even compiled in the tests"
    return f"for {architecture} the kernels are {tested} but not yet run: compare with backend='reference' first"


@functools.cache
def _refusal_of_device(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0, the least the kernels want"
    return None


def _architecture(index: int) -> str:
    """ "sm_90" or "gfx942", of one device: cards in a machine may differ, and so do the slices of one card."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def num_sms(device: torch.device) -> int:
    """How many multiprocessors (compute units) there are; 2 in the interpreter."""
    return _count_sms(gpu_index(device)) if device.type == "cuda" else 2


def bounds_registers(device: torch.device) -> bool:
    """Whether a kernel's registers are bounded: on sm_80 to sm_90. It was measured to pay on an H200; what is compiled
    for sm_100 and sm_120 would have 56 to 80 bytes of each thread in memory."""
    return device.type == "cuda" and torch.version.hip is None and _capability(gpu_index(device)) < (10, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _count_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def precision(device: torch.device) -> str:
    """Of products of float32: three TF32 products, as good as float32, where there is no float32 tensor core."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def interprets() -> bool:
    """Whether kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
