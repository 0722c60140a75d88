"""Prints a line of JSON, {case: {us, stock_us, share_ratio}}: microseconds of Python that a layer of a patched model
costs at every step, and one of stock. What `test_host_overhead.py` runs, in a process of its own.

Sixteen layers of SD 1.5's, 8 by 8 pixels, two entries, on a GPU that is not there. Left out of both are the launches,
the projections and `scaled_dot_product_attention`: they return tensors that were made before. A patched layer's share
of what the patch does before a forward is in it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import fake_gpu
import torch
import triton
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

import sdattn_fast
from sdattn_fast import places
from sdattn_fast.backend.triton import gpu
from sdattn_fast.cli.bench import full_program
from sdattn_fast.patching import steps, text_cache

LAYERS, BATCH, SIDE, CHANNELS, HEADS, TOKENS, TEXT = 16, 2, 8, 320, 8, 77, 768
ROUNDS = 60
CASES: dict[str, dict[str, Any]] = {
    "empty program": {"program": sdattn_fast.Program()},
    "program": {"program": full_program()},
    "random dropout": {"program": sdattn_fast.Program(sdattn_fast.SalienceDropout(0.3, mode="random")), "seed": 0},
    "program, capture": {"program": full_program(), "capture": sdattn_fast.Capture((1, 2, 3), steps=None, layers="*")},
    "program, smoothing": {
        "program": sdattn_fast.Program(sdattn_fast.SalienceDropout(0.3), sdattn_fast.Refinement(1, 0.1, 1.0))
    },
}


class Transformer2DModel(nn.Module):
    """A block with one attention layer; it and its arguments are named as diffusers', so that `apply` takes the grid
    from it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(
            CHANNELS, cross_attention_dim=TEXT, heads=HEADS, dim_head=CHANNELS // HEADS, processor=AttnProcessor2_0()
        )

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.attn(hidden_states.flatten(2).transpose(1, 2), encoder_hidden_states=encoder_hidden_states)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Transformer2DModel() for _ in range(LAYERS))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> None:
        for block in self.blocks:
            block(sample, encoder_hidden_states)


def without_work() -> None:
    """From here on nothing is computed: what Python does around it is left."""
    torch.set_num_threads(1)
    fake_gpu.use("sm_90")
    triton.runtime.driver.active.launcher_cls = lambda source, metadata: _launch_nothing
    gpu.interprets = lambda: True
    gpu.precision = lambda device: "tf32x3"
    for module in (places, steps, text_cache):
        module.looking_is_free = lambda device: False
    results: dict[Any, Tensor] = {}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        key = x.shape, weight.shape[0]
        if key not in results:
            results[key] = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
        return results[key]

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        if query.shape not in results:
            results[query.shape] = torch.zeros(query.shape, dtype=query.dtype)
        return results[query.shape]

    torch.nn.functional.linear = linear
    torch.nn.functional.scaled_dot_product_attention = attention


def _launch_nothing(*arguments: Any) -> None:
    pass


def layers(device: torch.device) -> Layers:
    return Layers().half().eval().requires_grad_(False).to(device)


def patched(case: str, backend: str, device: torch.device) -> Layers:
    model = layers(device)
    protected, active = torch.arange(TOKENS).expand(BATCH, TOKENS) > 20, torch.tensor([False, True])
    sdattn_fast.apply(model, protected=protected, active=active, backend=backend, fold="never", **CASES[case])
    return model


def inputs(device: torch.device) -> list[Tensor]:
    x = torch.zeros(BATCH, CHANNELS, SIDE, SIDE, dtype=torch.float16, device=device)
    return [x, torch.tensor(1, device=device), torch.randn(BATCH, TOKENS, TEXT, device=device).half()]


def microseconds(model: nn.Module, tensors: list[Tensor]) -> float:
    """Of one layer, until Python goes on."""
    start = time.perf_counter()
    model(*tensors)
    return 1e6 * (time.perf_counter() - start) / LAYERS


def main() -> None:
    without_work()
    cpu = torch.device("cpu")
    stock, tensors, figures = layers(cpu), inputs(cpu), {}
    with torch.no_grad():
        for name in CASES:
            models = {"us": patched(name, "triton", cpu), "stock_us": stock}
            times: dict[str, list[float]] = {key: [] for key in models}
            for turn in range(ROUNDS + 10):
                for key, model in models.items():
                    took = microseconds(model, tensors)
                    if turn >= 10:
                        times[key].append(took)
            medians = {key: statistics.median(taken) for key, taken in times.items()}
            share = medians["us"] / medians["stock_us"]
            figures[name] = {key: round(median, 1) for key, median in medians.items()} | {
                "share_ratio": round(share, 3)
            }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
