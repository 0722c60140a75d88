"""Whole cross-attention layers, from x to y, at the shapes of SD 1.5 and SDXL: ours with the full token program, text
constant, against diffusers' AttnProcessor2_0 with none, on the same modules, in turn.

`sum` adds the medians over a UNet's layers, each kind as often as it occurs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from sdattn_fast import Program, Refinement, SalienceDropout, SemanticAttnProcessor
from sdattn_fast.cli.registry import UNET_CONFIGS, UNET_LAYERS, LayerShape
from sdattn_fast.measure.timing import alternate

BATCH, TOKENS, CONTENT = 2, 77, 15
FULL = Program(SalienceDropout(0.2), Refinement(threshold=0.3, sigma=0), "content")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FOLDS = ("auto", "never", "always")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_layers_against_stock(benchmark: Any, model: str, dtype: str) -> None:
    totals = dict.fromkeys(("stock", *FOLDS), 0.0)
    megabytes_by_fold = dict.fromkeys(FOLDS, 0.0)
    table = benchmark.extra_info["rows"] = {}
    for layer in UNET_LAYERS[model]:
        took, megabytes = time_layer(layer, model, DTYPES[dtype])
        table[f"{layer.count} of {layer.height}x{layer.width}"] = figures(took, megabytes)
        for name, seconds in took.items():
            totals[name] += layer.count * seconds
        for fold in FOLDS:
            megabytes_by_fold[fold] += layer.count * megabytes[fold]
    table["sum"] = figures(totals, megabytes_by_fold)
    benchmark.pedantic(lambda: None, rounds=1)


def figures(took: dict[str, float], megabytes: dict[str, float]) -> dict[str, float]:
    shares = {"stock_ms": round(1e3 * took["stock"], 2)}
    for fold in FOLDS:
        shares[f"{fold}_share"] = round(took[fold] / took["stock"], 3)
        shares[f"{fold}_MB_a_prompt"] = round(megabytes[fold], 1)
    return shares


def time_layer(layer: LayerShape, model: str, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a call by stock and by each `fold`, and megabytes kept a prompt by each `fold`."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    channels, width = layer.num_heads * layer.head_dim, int(UNET_CONFIGS[model]["cross_attention_dim"])
    attn = Attention(channels, width, heads=layer.num_heads, dim_head=layer.head_dim).to(dtype).eval()
    x = torch.randn(BATCH, layer.pixels, channels).to(dtype)
    text = torch.randn(BATCH, TOKENS, width).to(dtype)
    protected = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    protected[:, 1 : 1 + CONTENT] = False
    phrases = torch.full((BATCH, TOKENS), -1)
    phrases[:, 2:4] = 0
    text_inputs = {"gate": torch.rand(BATCH, TOKENS) + 0.5, "phrases": phrases, "protected": protected}
    processors: dict[str, Any] = {"stock": AttnProcessor2_0()}
    processors |= {fold: SemanticAttnProcessor(FULL, fold=fold, **text_inputs) for fold in FOLDS}
    calls = {name: lambda p=p: p(attn, x, text) for name, p in processors.items()}
    with torch.no_grad():
        took = alternate(calls, seconds=0.8)
    return took, {fold: processors[fold].text.cached.bytes() / 1e6 for fold in FOLDS}
