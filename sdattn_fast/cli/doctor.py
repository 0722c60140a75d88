"""`sdattn-fast doctor`: what is here, what each backend can do, how to mend what it cannot, and what to do next.

Its output goes into bug reports: versions and hardware, no path of a user.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import plain_console, within

__all__ = ["backend_rows", "doctor", "next_steps", "processor_name"]

_PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "sdattn-fast-lab",
)  # fmt: skip
# What changes which kernels run, and how.
_VARIABLES = ("SDATTN_FAST_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            help="Also show which layers of a model are served, and of a UNet which are folded: sd15, sd21, sdxl, "
            "shapes, objects, a folder or a hub ID."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of that model: float32 or bfloat16.")] = "float32",
    batch: Annotated[
        int, typer.Option(help="Batch entries of that model, counting both guidance halves.", callback=within(1, 256))
    ] = 2,
) -> None:
    """Show versions, devices, and whether each backend is available and, if not, how to fix it. For bug reports."""
    import torch
    from rich.table import Table

    from .. import __version__
    from ..backend import cpu

    console = plain_console()
    ground = Table("what", "found", title=f"sdattn_fast {__version__}")
    ground.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        ground.add_row(name, _version(name) or f"not installed (pip install {name})")
    ground.add_row("CPU", f"{processor_name()}, torch uses {torch.get_num_threads()} of {os.cpu_count()} threads")
    for index in range(torch.cuda.device_count()):
        ground.add_row(f"GPU {index}", _gpu(torch.cuda.get_device_properties(index)))
    if not torch.cuda.device_count():
        ground.add_row("GPU", "none that torch can see")
    for key, value in cpu.info().items():
        ground.add_row(f"core: {key}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    for name in _VARIABLES:
        if name in os.environ:
            ground.add_row(name, os.environ[name])
    console.print(ground)

    table = Table(
        "backend", "available", "why not, and how to fix it", title="Backends, as sdattn_fast.backends() says"
    )
    for row in backend_rows():
        table.add_row(*row)
    console.print(table)

    gaps = Table(
        "what", "why", title="Not supported by any kernel: the plain torch reference runs it (a named backend raises)"
    )
    gaps.add_row("gradients of rounds and axis 'space'", "there is no backward kernel for programs over the picture")
    console.print(gaps)
    if model is not None:
        _print_model(console, model, dtype, batch)
    for step in next_steps():
        console.print(f"Next: {step}", soft_wrap=True)


def next_steps() -> list[str]:
    """What would make sdattn_fast work, or work faster, on this machine; where nothing would, what to try."""
    import torch

    from ..backend import unavailable

    steps = []
    if torch.cuda.is_available() and unavailable("triton", torch.device("cuda")) is not None:
        steps.append("fix the backend triton as the table says: no kernel of it serves the GPU now")
    if unavailable("cpu") is not None:
        steps.append("fix the backend cpu as the table says: on the CPU the plain torch reference runs now")
    if _version("diffusers") is None or _version("transformers") is None:
        steps.append("pip install 'sdattn-fast[diffusers]', which pipelines need")
    if steps:
        return steps
    steps = ["try sdattn-fast demo (pictures) or sdattn-fast bench (speed); nothing is missing"]
    if torch.cuda.is_available():
        steps.append("in Python, sdattn_fast.warm_up(pipe) compiles the kernels before the first picture")
    return steps


def backend_rows() -> list[tuple[str, str, str]]:
    """(backend, "yes" or "no", the reason or a remark); of several GPUs, each by itself."""
    import torch

    from ..backend import NAMES, remark, unavailable

    count = torch.cuda.device_count()
    rows = []
    for name in NAMES:
        several = count > 1 and name in ("triton", "cuda")
        for device in [torch.device("cuda", index) for index in range(count)] if several else [None]:
            reason = unavailable(name, device)
            label = name if device is None else f"{name} on GPU {device.index}"
            said = reason or remark(name, device) or ""
            # An ImportError names the file of the package.
            rows.append((label, "yes" if reason is None else "no", said.replace(str(Path.home()), "~")))
    return rows


def _gpu(properties: Any) -> str:
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB"


def _print_model(console: Any, model: str, dtype: str, batch: int) -> None:
    import torch
    from rich.table import Table

    from ..patching.attention_kinds import attention_kinds
    from ..patching.model_kinds import denoisers
    from .generate import pipeline_of
    from .registry import UNET_CONFIGS, build_random_unet

    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"expected float32 or bfloat16, got {dtype!r}", param_hint="--dtype")
    kind = getattr(torch, dtype)
    with console.status(f"Loading {model}"):
        if model in UNET_CONFIGS:
            models = {"unet": build_random_unet(model, kind)}
        else:
            models = denoisers(pipeline_of(model, "cpu", dtype))
    table = Table("part", "layers", "attention", "served", title=f"{model}: attention to text")
    for part, one in models.items():
        for of_kind in attention_kinds(one):
            name = f"{of_kind.attention}, {of_kind.processor}"
            served = "yes" if of_kind.why is None else f"no: {of_kind.why}"
            table.add_row(part, str(len(of_kind.layers)), name, served)
    console.print(table)
    if "unet" in models:
        _print_folds(console, models["unet"], model, dtype, batch)


def _print_folds(console: Any, unet: Any, model: str, dtype: str, batch: int) -> None:
    import torch
    from rich.table import Table

    from .folds import fold_table
    from .registry import random_inputs

    with console.status(f"Running {model} once"):
        rows = fold_table(unet, random_inputs(unet.config, batch, getattr(torch, dtype)))
    table = Table(title=f"{model}, batch {batch}, {dtype}: projections folded into the text; ms measured (expected)")
    for column in ("layers", "pixels", "channels", "heads", "folded", "ms", "not folded", "MB each"):
        table.add_column(column, justify="left" if column == "folded" else "right")
    for row in rows:
        ms = [_against(row.measured, row.expected.get(row.kind)), _against(row.unfolded, row.expected.get("none"))]
        numbers = (len(row.names), row.pixels, row.channels, row.num_heads)
        table.add_row(*map(str, numbers), row.kind, *ms, f"{row.cached_bytes / 1e6:.1f}")
    console.print(table)
    took = 1e3 * sum(len(row.names) * row.measured for row in rows)
    unfolded = 1e3 * sum(len(row.names) * row.unfolded for row in rows)
    megabytes = sum(len(row.names) * row.cached_bytes for row in rows) / 1e6
    console.print(
        f"A step's cross-attention: {took:.1f} ms, {unfolded:.1f} with fold='never'; {megabytes:.0f} MB per prompt"
    )
    slower = sum(len(row.names) for row in rows if row.kind != "none" and row.measured > row.unfolded)
    if slower:
        console.print(
            f"In {slower} layers folding measured slower. It is chosen by the expected times, so that a model runs the "
            "same way every time; of one short measurement the noise may be greater than the difference. Where it is "
            "slower again and again, pass fold='never' to apply."
        )


def _against(measured: float, expected: float | None) -> str:
    return f"{1e3 * measured:.2f}" if expected is None else f"{1e3 * measured:.2f} ({1e3 * expected:.2f})"


def processor_name() -> str:
    """The CPU's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
