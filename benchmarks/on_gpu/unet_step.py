"""A step of a whole UNet with random weights: stock, and patched with each backend; eager, and as one CUDA graph.

All share their weights and take turns. Also: whether a step after the first waits for the GPU anywhere
(`torch.cuda.set_sync_debug_mode("error")`), the most memory that it takes with and without maps, a profiler's trace.
"""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import sdattn_fast
from sdattn_fast.cli.bench import full_program
from sdattn_fast.cli.registry import UNET_CONFIGS, build_random_unet, random_inputs, twin_of
from sdattn_fast.measure.memory import peak_mib

from . import record, timing
from .checks import failed_check
from .ground import DEVICE, DRY, SHAPES, NotRun, prompt_inputs, why_no

__all__ = ["NEEDS", "step"]

NEEDS = ["full"] if DRY else ["full", "full-maps"]  # checks, at every shape of the model
# What `apply` is asked beside the backend.
KINDS: dict[str, dict[str, Any]] = {"": {}, "-maps": {"capture": sdattn_fast.Capture((1, 2, 3), steps="latest")}}
DRY_CONFIG = {
    "sample_size": 4, "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 2,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@torch.no_grad()
def step(item: str, model: str, batch: int) -> None:
    """Figures of one model. Raises AssertionError, once all is measured, where something of ours failed."""
    if DRY:
        UNET_CONFIGS[model] = DRY_CONFIG
    torch.manual_seed(0)
    dtype = torch.float32 if DRY else torch.float16
    stock = build_random_unet(model, dtype, DEVICE)
    inputs = random_inputs(UNET_CONFIGS[model], batch, dtype, DEVICE)
    of = {"model": model, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    faults: list[str] = []
    heavy = model == "sdxl" and batch > 2

    def fault(name: str, mode: str, error: object) -> None:
        why = record.untimed(item, name, error, mode, **of)
        if not isinstance(error, NotRun):
            faults.append(f"{name}, {mode}: {why}")

    calls: dict[str, timing.Call] = {"stock": lambda: stock(**inputs).sample}
    exact = stock(**inputs).sample
    for name, settings, why in _patched_contestants(model):
        if why or (heavy and name not in ("triton", "cuda")):
            record.untimed(item, name, why or "left out at this size", **of)
            continue
        try:
            unet = twin_of(stock)
            # First, that the patch is put in where it should be: the empty program is stock's attention.
            with sdattn_fast.apply(unet, **{k: v for k, v in settings.items() if k != "capture"}):
                got = unet(**inputs).sample
                assert (got - exact).norm() <= 0.02 * exact.norm(), "the empty program's picture is not stock's"
            sdattn_fast.apply(unet, full_program(), **prompt_inputs(batch), **settings)
            assert unet(**inputs).sample.isfinite().all(), "not finite"
            calls[name] = lambda unet=unet: unet(**inputs).sample  # type: ignore[misc]
        except Exception as error:
            fault(name, "eager", error)

    def measure(mode: str, contestants: dict[str, timing.Call]) -> None:
        figures = timing.figures(timing.in_turn(contestants, rounds=5 if heavy else 9, sample=0.0), of="stock")
        for name in figures if mode == "eager" else ():
            figures[name]["peak_mib"] = round(peak_mib(calls[name], DEVICE), 1)
        timing.write(item, mode, figures, **of)

    measure("eager", calls)
    unfit = {name: "what waits for the GPU cannot be captured" for name in calls if _waits(name, calls[name], fault)}
    unfit |= {name: "it sends the token side anew at every call" for name in calls if name.endswith("no-text-cache")}
    for name, why in unfit.items():
        fault(name, "graph", NotRun(why))
    may = {name: call for name, call in calls.items() if name not in unfit}
    graphs = timing.graphs(may, lambda name, error: fault(name, "graph", error), 1)
    if graphs:
        measure("graph", graphs)
    _trace(item, calls)
    assert not faults, "; ".join(faults)


def _patched_contestants(model: str) -> list[tuple[str, dict[str, Any], str | None]]:
    """(name, settings for `apply`, why it is not timed) of every patched contestant."""
    shapes = [name for name in SHAPES if name.startswith(model)]
    contestants = []
    for backend in ("triton", "cuda"):
        why = why_no(backend)
        for shape in shapes:
            why = why or failed_check(backend, NEEDS, shape)
        for kind, settings in KINDS.items():
            contestants.append((backend + kind, {"backend": backend, **settings}, why))
        if backend == "triton":
            contestants.append(("triton-no-text-cache", {"backend": backend, "text_cache": False}, why))
    return contestants


def _waits(name: str, call: timing.Call, fault: Any) -> bool:
    """Whether a step after the first waits for the GPU somewhere."""
    if DEVICE.type != "cuda":
        return False
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        return False
    except Exception as error:
        fault(name, "without waiting", error)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _trace(item: str, calls: dict[str, timing.Call]) -> None:
    """One step of stock and one of Triton's, for https://ui.perfetto.dev."""
    if DRY or item != "step/sd15/2":
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for name in ("stock", "triton"):
            if name in calls:
                with torch.profiler.record_function(name):
                    calls[name]()
                    torch.cuda.synchronize()
    path = Path(os.environ["SDATTN_GPU_STATE"]) / "trace.json"
    profile.export_chrome_trace(str(path))
    compressed = Path(os.environ["SDATTN_GPU_RESULTS"]) / "trace-step-sd15-2.json.gz"
    with path.open("rb") as plain, gzip.open(compressed, "wb") as packed:
        shutil.copyfileobj(plain, packed)
    path.unlink()
