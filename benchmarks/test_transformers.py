"""A cross-attention layer of a transformer, from x to y, at its true geometry with random weights: ours against stock.

Texts of 20 tokens, padded to the pipelines' length. Ways: the stock processor; one that computes and keeps the whole
map, as tools that show maps do; ours with plain attention, with the full token program, and with that and captured maps
(the mean over heads). Memory: the most that tensors of a call take together, by torch's profiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.measure.timing import alternate

LENGTH = 20
FULL = Program(SalienceDropout(0.2), Refinement(threshold=0.3, sigma=0), "content")


@dataclass(frozen=True)
class Shape:
    """One layer. kind: of its model, whose padding the patch knows. batch: two with guidance in one forward."""

    kind: str
    pixels: int
    heads: int
    width: int
    tokens: int
    batch: int = 2

    @property
    def channels(self) -> int:
        return self.heads * self.width


SHAPES = {
    "PixArt-alpha 1024": Shape("pixart", 64 * 64, 16, 72, 120),
    "PixArt-Sigma 1024": Shape("pixart", 64 * 64, 16, 72, 300),
    "Sana 1.6B 1024": Shape("pixart", 32 * 32, 20, 112, 300),
    "LTX 512x768x121": Shape("ltx", 16 * 16 * 24, 32, 64, 128),
    "Wan 1.3B 480x832x81": Shape("wan", 21 * 30 * 52, 12, 128, 512, batch=1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = {
    "ours": {"program": Program()},
    "ours, full": {"program": FULL},
    "ours, full, maps": {"program": FULL, "capture": Capture()},
}


class MapProcessor:
    """A stock processor that computes the probabilities and keeps them."""

    def __init__(self) -> None:
        self.map: Tensor | None = None

    def __call__(
        self, attn: Any, x: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, *_: Any
    ) -> Any:
        query, key, value = attn.to_q(x), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (query, key, value))
        logits = query @ key.mT * query.shape[-1] ** -0.5
        self.map = (logits if attention_mask is None else logits + attention_mask[:, None]).softmax(-1)
        return attn.to_out[0]((self.map @ value).transpose(1, 2).flatten(2))


class OneLayer(nn.Module):
    """A model of one layer, that treats its text as the models of its kind do."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.attn2 = attn

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Any = None) -> Any:
        if encoder_attention_mask is None:
            return self.attn2(hidden_states, encoder_hidden_states)
        bias = (1 - encoder_attention_mask.to(hidden_states.dtype)) * -10000.0
        return self.attn2(hidden_states, encoder_hidden_states, bias[:, None])


def one_layer(shape: Shape) -> OneLayer:
    """Under the name of the model's class, by which the patch knows its kind."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers import pixart_transformer_2d, transformer_ltx, transformer_wan

    channels, heads, width = shape.channels, shape.heads, shape.width
    if shape.kind == "wan":
        processor = transformer_wan.WanAttnProcessor()
        attn: Any = transformer_wan.WanAttention(
            channels, heads, width, cross_attention_dim_head=width, processor=processor
        )
        named = transformer_wan.WanTransformer3DModel
    elif shape.kind == "ltx":
        attn = transformer_ltx.LTXAttention(channels, heads, heads, width, cross_attention_dim=channels)
        named = transformer_ltx.LTXVideoTransformer3DModel
    else:
        attn = Attention(channels, channels, heads=heads, dim_head=width, bias=True)
        named = pixart_transformer_2d.PixArtTransformer2DModel
    model = type(named.__name__, (OneLayer,), {"__module__": named.__module__, "__qualname__": named.__qualname__})
    made: OneLayer = model(attn)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_layers_with_padded_text(benchmark: Any, peak_mib: Any, name: str, dtype: str) -> None:
    shape, kind = SHAPES[name], DTYPES[dtype]
    models = {}
    for way in ("stock", "every map", *WAYS):
        torch.manual_seed(1)
        models[way] = one_layer(shape).to(kind).eval().requires_grad_(False)
    taking_part = (torch.arange(shape.tokens) < LENGTH).int()
    text = torch.randn(shape.batch, shape.tokens, shape.channels, dtype=kind)
    inputs = {"hidden_states": torch.randn(shape.batch, shape.pixels, shape.channels, dtype=kind)}
    if shape.kind == "wan":
        inputs["encoder_hidden_states"] = text * taking_part[:, None].to(kind)
    else:
        inputs |= {"encoder_hidden_states": text, "encoder_attention_mask": taking_part.expand(shape.batch, -1)}
    told = {"gate": torch.rand(shape.tokens) + 0.5, "active": torch.arange(shape.batch) == shape.batch - 1}
    models["every map"].attn2.set_processor(MapProcessor())
    for way, options in WAYS.items():
        sdattn_fast.apply(models[way], **options, **(told if "full" in way else {}))
    with torch.no_grad():
        took = alternate({way: lambda one=one: one(**inputs) for way, one in models.items()}, seconds=2.0)
        memory = {way: peak_mib(lambda one=one: one(**inputs)) for way, one in models.items()}
    rows = benchmark.extra_info["rows"] = {}
    for way in models:
        rows[way] = {
            "ms": round(1e3 * took[way], 2),
            "share_of_stock": round(took[way] / took["stock"], 3),
            "share_of_every_map": round(took[way] / took["every map"], 3),
            "peak_MiB": round(memory[way], 1),
            "memory_share_of_every_map": round(memory[way] / memory["every map"], 3),
            "over_stock_MiB": round(memory[way] - memory["stock"], 1),
        }
    benchmark.pedantic(lambda: None, rounds=1)
