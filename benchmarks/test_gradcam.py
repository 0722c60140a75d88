"""GradCAM of one prediction of SD 1.5's UNet, true geometry, random weights, float32, one entry, five tokens.

The score is the noise-prediction loss, relevance is asked of the 16x16 level or of every cross-attention layer. Ways:
stock, differentiated by the latents (no map, no relevance); plain torch, whose processors keep each asked layer's map,
and which differentiates by those maps; and ours, with no program and with a full one. Calls take turns;
memory is what a call's tensors take at the most, over the weights. No test asserts a figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdattn_fast import Program, Refinement, SalienceDropout
from sdattn_fast.measure.timing import alternate

pytest.importorskip("diffusers")

TOKENS = (1, 2, 3, 5, 8)
FULL = Program(SalienceDropout(0.2), Refinement(threshold=0.3, sigma=0), "content")


class DifferentiatedMaps:
    """A stock processor that computes the probabilities, keeps them, and has them differentiated by."""

    def __init__(self, maps: dict[str, Tensor], name: str) -> None:
        self.maps, self.name = maps, name

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(x))
        key, value = (attn.head_to_batch_dim(to(encoder_hidden_states)) for to in (attn.to_k, attn.to_v))
        p = attn.get_attention_scores(query, key, attention_mask)
        self.maps[self.name] = p if p.requires_grad else p.requires_grad_()
        return attn.to_out[0](attn.batch_to_head_dim(p @ value))


@pytest.mark.parametrize("layers", ["16x16", "every"])
def test_a_relevance_map(benchmark, peak_mib, layers):
    import sdattn_fast
    from sdattn_fast.cli.registry import build_random_unet, random_inputs
    from sdattn_fast.guidance.objectives import NoisePrediction
    from sdattn_fast.guidance.relevance import gradcam

    unet = build_random_unet("sd15", torch.float32).requires_grad_(False)
    inputs = random_inputs(unet.config, 1, torch.float32)
    latents, t, text = inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
    target = torch.randn(latents.shape)
    stock = dict(unet.attn_processors)
    layers_looked_at = [
        (name, attn)
        for name, attn in unet.named_modules()
        if name.endswith("attn2") and (layers == "every" or (attn.inner_dim == 1280 and "mid" not in name))
    ]
    names = [name for name, _ in layers_looked_at]

    def score(x: Tensor) -> Tensor:
        return -F.mse_loss(unet(x, t, encoder_hidden_states=text).sample, target)

    def stored() -> list[Tensor]:
        maps: dict[str, Tensor] = {}
        for name, attn in layers_looked_at:
            attn.set_processor(DifferentiatedMaps(maps, name))
        grads = torch.autograd.grad(score(latents), [maps[name] for name in names])
        unet.set_attn_processor(dict(stock))
        return [
            (maps[name] * grad.relu())[..., list(TOKENS)].sum(0).T.detach()
            for name, grad in zip(names, grads, strict=True)
        ]

    def patched_maps(program: Program) -> list[Tensor]:
        with sdattn_fast.apply(unet, program) as patch:
            relevance = gradcam(patch, latents, t, text, NoisePrediction(target), tokens=TOKENS, layers=names)
        return [relevance[name][0].flatten(1) for name in names]

    ways: dict[str, Callable[[], object]] = {
        "stock, by the latents": lambda: score(latents.clone().requires_grad_()).backward(),
        "stored maps": stored,
        "ours": lambda: patched_maps(Program()),
        "ours, full program": lambda: patched_maps(FULL),
    }
    for patched_map, stored_map in zip(patched_maps(Program()), stored(), strict=True):
        torch.testing.assert_close(patched_map, stored_map, rtol=1e-3, atol=1e-3 * float(stored_map.max()))
    medians = alternate(ways, seconds=0)
    benchmark.extra_info["rows"] = {
        way: {
            "ms": round(1e3 * medians[way]),
            "of_stored_maps_ratio": round(medians[way] / medians["stored maps"], 3),
            "peak_MiB": round(peak_mib(call), 1),
        }
        for way, call in ways.items()
    }
    benchmark.pedantic(lambda: None, rounds=1)
