"""What inactive heads save: cross-attention layers of SD 1.5 and SDXL, from x to y, text constant, the token program in
the active heads, at several shares of active heads, in turn with the same layer where all heads are active.

"plain" heads still attend; "zero" heads need not be computed. `sum` adds the medians over a UNet's layers, each kind as
often as it occurs. The last lines are a whole step of SD 1.5's UNet.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import sdattn_fast
from sdattn_fast import Program, Refinement, SalienceDropout, SemanticAttnProcessor
from sdattn_fast.cli.registry import UNET_CONFIGS, UNET_LAYERS, LayerShape, build_random_unet, random_inputs, twin_of
from sdattn_fast.measure.timing import alternate

BATCH, TOKENS, CONTENT = 2, 77, 15
PROGRAM = Program(SalienceDropout(0.2), Refinement(threshold=0.3, sigma=0), "content")
WAYS = {
    "half_plain": (0.5, "plain"),
    "half_zero": (0.5, "zero"),
    "quarter_zero": (0.25, "zero"),
}


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_inactive_heads(benchmark: Any, model: str) -> None:
    totals = dict.fromkeys(("all", *WAYS), 0.0)
    table = benchmark.extra_info["rows"] = {}
    for layer in UNET_LAYERS[model]:
        took = time_layer(layer, model)
        table[f"{layer.count} of {layer.height}x{layer.width}"] = figures(took)
        for name, seconds in took.items():
            totals[name] += layer.count * seconds
    table["sum"] = figures(totals)
    benchmark.pedantic(lambda: None, rounds=1)


def test_step_of_sd15(benchmark: Any) -> None:
    unet = build_random_unet("sd15").requires_grad_(False)
    inputs = random_inputs(unet.config, BATCH, torch.float32)
    active, protected = torch.tensor([False, True]), torch.ones(TOKENS, dtype=torch.bool)
    protected[1 : 1 + CONTENT] = False
    steps = {}
    for name, (share, inactive) in {"all": (1.0, "plain"), **WAYS}.items():
        twin = twin_of(unet)
        heads = range(round(8 * share))
        sdattn_fast.apply(twin, PROGRAM, heads=heads, inactive_heads=inactive, active=active, protected=protected)
        steps[name] = lambda twin=twin: twin(**inputs)
    with torch.no_grad():
        took = alternate(steps, seconds=1.0, least=3)
    benchmark.extra_info["rows"] = {"float32": figures(took)}
    benchmark.pedantic(lambda: None, rounds=1)


def figures(took: dict[str, float]) -> dict[str, float]:
    shares = {"all_active_ms": round(1e3 * took["all"], 2)}
    for name in WAYS:
        shares[f"{name}_share"] = round(took[name] / took["all"], 3)
    return shares


def time_layer(layer: LayerShape, model: str) -> dict[str, float]:
    """Seconds of a call with all heads active, and in each of `WAYS`."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    channels, width = layer.num_heads * layer.head_dim, int(UNET_CONFIGS[model]["cross_attention_dim"])
    attn = Attention(channels, width, heads=layer.num_heads, dim_head=layer.head_dim).eval()
    x, text = torch.randn(BATCH, layer.pixels, channels), torch.randn(BATCH, TOKENS, width)
    protected = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    protected[:, 1 : 1 + CONTENT] = False
    processors = {"all": SemanticAttnProcessor(PROGRAM, protected=protected)}
    for name, (share, inactive) in WAYS.items():
        heads = range(round(layer.num_heads * share))
        processors[name] = SemanticAttnProcessor(PROGRAM, protected=protected, heads=heads, inactive_heads=inactive)
    calls = {name: lambda p=p: p(attn, x, text) for name, p in processors.items()}
    with torch.no_grad():
        return alternate(calls, seconds=0.4)
