"""`sdattn-fast doctor`: what is here, what each backend can do, and how to mend what it cannot."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import plain_console, within

__all__ = ["backend_rows", "doctor", "processor_name"]

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


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
    """Show versions, devices, and whether each backend is available and, if not, how to fix it."""
    import torch
    from rich.table import Table

    from .. import __version__
    from ..backend import cpu

    console = plain_console()
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
            rows.append((label, "yes" if reason is None else "no", reason or remark(name, device) or ""))
    return rows


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


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install {name})"
