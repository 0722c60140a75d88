"""`sdattn-fast bench`: the op and a whole UNet step against stock, side by side in one run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import plain_console, within
from .registry import UNET_CONFIGS, UNET_LAYERS, LayerShape, build_random_unet, random_inputs, twin_of

__all__ = ["bench", "full_program", "text_side"]


def bench(
    model: Annotated[list[str] | None, typer.Option(help="sd15, sd21 or sdxl; may be repeated. Default: all.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch: Annotated[
        int, typer.Option(help="Batch entries, counting both guidance halves.", callback=within(1, 256))
    ] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str, typer.Option(help="auto, triton, cuda, cpu or reference.")] = "auto",
    content: Annotated[int, typer.Option(help="Content tokens in each entry, of 77.", callback=within(0, 77))] = 20,
    step: Annotated[bool, typer.Option("--step", help="Also time a whole UNet step (minutes on a CPU).")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also time torch.compile of the reference.")] = False,
    seconds: Annotated[
        float, typer.Option(help="Seconds of timing for each contestant and shape.", callback=within(0, 3600))
    ] = 1.0,
) -> None:
    """Time the full row program against plain attention, at the shapes of SD 1.5, 2.1 and SDXL.

    Every figure is a median of alternating calls in this one run, as a share of the time of PyTorch's
    scaled_dot_product_attention, which does none of the program. Below 1.00 we are faster than plain attention.
    """
    import torch

    from ..backend import NAMES
    from ..loading import checked_device

    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"expected float32, bfloat16 or float16, got {dtype!r}", param_hint="--dtype")
    if backend not in ("auto", *NAMES):
        raise typer.BadParameter(f"expected auto or one of {', '.join(NAMES)}, got {backend!r}", param_hint="--backend")
    chosen = model or list(UNET_LAYERS)
    for name in chosen:
        if name not in UNET_LAYERS:
            raise typer.BadParameter(f"expected one of {', '.join(UNET_LAYERS)}, got {name!r}", param_hint="--model")
    device = checked_device(device)

    kind = getattr(torch, dtype)
    _print_ground(torch, device)
    _op_table(chosen, kind, batch, device, backend, content, compiled, seconds)
    if step:
        for name in chosen:
            if name in UNET_CONFIGS:
                _step_table(name, kind, batch, device, backend, content, seconds)


def full_program() -> Any:
    """The full token program of the benchmarks: dropout, NMS and renormalization; gate and phrases come beside it."""
    from ..program import Program, Refinement, SalienceDropout

    return Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0), "content")


def text_side(batch: int, tokens: int, content: int, device: Any = "cpu") -> dict[str, Any]:
    """Gate, phrases and token classes of a prompt of `content` words after BOS, with two phrases, in every entry."""
    import torch

    protected = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    protected[:, 1 : 1 + content] = False
    phrases = torch.full((batch, tokens), -1, dtype=torch.int64, device=device)
    phrases[:, 2:5], phrases[:, 6:9] = 0, 1
    gate = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0)).to(device) + 0.5
    return {"gate": gate, "phrases": phrases, "protected": protected}


def _op_table(
    models: list[str], dtype: Any, batch: int, device: str, backend: str, content: int, compiled: bool, seconds: float
) -> None:
    import torch
    from rich.table import Table

    title = f"{batch} x heads x pixels x 77, {content} content tokens, {str(dtype).removeprefix('torch.')}"
    table = Table(title=title)
    for column in ("model", "heads", "pixels", "head dim", "SDPA ms", "empty", "full", "reference"):
        table.add_column(column, justify="left" if column == "model" else "right")
    if compiled:
        table.add_column("compiled", justify="right")
    logs = []
    for name in models:
        for layer in UNET_LAYERS[name]:
            took = _time_op(layer, dtype, batch, device, backend, content, compiled, seconds)
            sdpa = took.pop("sdpa")
            logs.append(took["full"] / sdpa)
            shares = [f"{took[x] / sdpa:.2f}" for x in took]
            table.add_row(
                name,
                str(layer.num_heads),
                f"{layer.height}x{layer.width}",
                str(layer.head_dim),
                f"{1e3 * sdpa:.3f}",
                *shares,
            )
    console = plain_console()
    console.print(table)
    mean = torch.tensor(logs, dtype=torch.float64).log().mean().exp().item()
    console.print(f"Columns after SDPA are shares of its time. Geometric mean of 'full': {mean:.2f}\n")


def _time_op(
    layer: LayerShape, dtype: Any, batch: int, device: str, backend: str, content: int, compiled: bool, seconds: float
) -> dict[str, float]:
    import torch

    from ..functional import prepare
    from ..measure.timing import alternate
    from ..program import Program

    h, m, d = layer.num_heads, layer.pixels, layer.head_dim
    query, key, value = (torch.randn(batch, h, s, d, device=device).to(dtype) for s in (m, 77, 77))
    side: dict[str, Any] = {"batch": batch, "heads_count": h, "tokens": 77, "device": query.device}
    text = text_side(batch, 77, content, device)
    full = prepare(full_program(), **side, **text, backend=backend)
    empty = prepare(Program(), **side, backend=backend)
    reference = prepare(full_program(), **side, **text, backend="reference")
    contestants: dict[str, Any] = {
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value),
        "empty": lambda: empty(query, key, value),
        "full": lambda: full(query, key, value),
    }
    with torch.no_grad():
        took = alternate(contestants, seconds=seconds)
        slow: dict[str, Any] = {"reference": lambda: reference(query, key, value)}
        if compiled:
            whole = torch.compile(lambda q, k, v: reference(q, k, v)[0])
            slow["compiled"] = lambda: whole(query, key, value)
        return {**took, **alternate(slow, seconds=seconds / 2, least=3)}


def _step_table(name: str, dtype: Any, batch: int, device: str, backend: str, content: int, seconds: float) -> None:
    import torch
    from rich.table import Table

    from .. import apply
    from ..measure.memory import peak_mib
    from ..measure.timing import alternate

    console = plain_console()
    with console.status(f"Building the {name} UNet, random weights"):
        unet = build_random_unet(name, dtype, device)
    inputs = random_inputs(UNET_CONFIGS[name], batch, dtype, device)
    text = {key: x for key, x in text_side(batch, 77, content, device).items()}
    patched = twin_of(unet)
    apply(patched, full_program(), **text, backend=backend)

    def run_stock() -> None:
        unet(**inputs)

    def run_patched() -> None:
        patched(**inputs)

    with torch.no_grad(), console.status(f"Timing a step of {name}"):
        took = alternate({"stock": run_stock, "full": run_patched}, seconds=seconds, least=3)
        peak = {"stock": peak_mib(run_stock, device), "full": peak_mib(run_patched, device)}
    table = Table(title=f"A step of the {name} UNet, batch {batch}, random weights")
    for column in ("attention", "ms", "share of stock", "peak MiB of tensors"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for label, key in (("stock", "stock"), ("ours, full program", "full")):
        share = took[key] / took["stock"]
        table.add_row(label, f"{1e3 * took[key]:.0f}", f"{share:.3f}", f"{peak[key]:.0f}")
    console.print(table)


def _print_ground(torch: Any, device: str) -> None:
    from ..backend import cpu
    from .doctor import processor_name

    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else processor_name()
    isa = cpu.info().get("isa", "none")
    print(f"{hardware}; torch {torch.__version__}, {torch.get_num_threads()} threads; core: {isa}")
