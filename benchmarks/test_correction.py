"""One correction of a picture by SD 1.5's UNet: true geometry, random weights, one entry, the 16x16 level's maps.

Ways: a step of stock, prompt and unconditional entry, without gradients, which the others are compared with; plain
torch, as Attend-and-Excite corrects, whose processors keep the maps of all layers, and whose forward runs to its end;
ours, to its end; and ours as it is, which stops after the last captured layer. Calls take turns; memory is what a
call's tensors take at the most, over the weights. No test asserts a figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdattn_fast.measure.timing import alternate

pytest.importorskip("diffusers")

PHRASES = [(2, 3), (6,)]


class StoredMaps:
    """A stock processor that computes the probabilities and keeps their mean over heads."""

    def __init__(self, maps: list[Tensor]) -> None:
        self.maps = maps

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(x))
        text = x if encoder_hidden_states is None else encoder_hidden_states
        key, value = (attn.head_to_batch_dim(to(text)) for to in (attn.to_k, attn.to_v))
        p = attn.get_attention_scores(query, key, attention_mask)
        if encoder_hidden_states is not None and p.shape[1] == 256:
            self.maps.append(p.mean(0).T.unflatten(1, (16, 16)))
        return attn.to_out[0](attn.batch_to_head_dim(p @ value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_correction(benchmark, peak_mib, dtype):
    import sdattn_fast
    from sdattn_fast.cli.registry import build_random_unet, random_inputs
    from sdattn_fast.guidance.objectives import Presence
    from sdattn_fast.guidance.relevance import Seen, run
    from sdattn_fast.patching.maps import Maps

    unet = build_random_unet("sd15", dtype).requires_grad_(False)
    inputs = random_inputs(unet.config, 1, dtype)
    of_two = random_inputs(unet.config, 2, dtype)
    t, text = inputs["timestep"], inputs["encoder_hidden_states"]
    presence = Presence(PHRASES)
    stock = dict(unet.attn_processors)

    def step() -> None:
        with torch.no_grad():
            unet(**of_two)

    def plain() -> Tensor:
        maps: list[Tensor] = []
        x = inputs["sample"].clone().requires_grad_()
        unet.set_attn_processor(StoredMaps(maps))
        prediction = unet(x, t, encoder_hidden_states=text).sample
        unet.set_attn_processor(dict(stock))
        mean = torch.stack(maps).mean(0)[None]
        score = presence(Seen(prediction, x, t, Maps({"all": mean}, tuple(range(77)), (64, 64))))
        return torch.autograd.grad(score, x)[0]

    def ours(maps_alone: bool) -> Tensor:
        x = inputs["sample"].clone().requires_grad_()
        with sdattn_fast.apply(unet, capture=sdattn_fast.Capture()) as patch:
            seen = run(patch, x, t, text, maps_alone=maps_alone)
            return torch.autograd.grad(presence(seen), x)[0]

    ways: dict[str, Callable[[], object]] = {
        "stock, a step": step,
        "plain torch": plain,
        "ours, to the end": lambda: ours(False),
        "ours": lambda: ours(True),
    }
    assert torch.equal(ours(True), ours(False))
    if dtype == torch.float32:
        gradient = plain()
        torch.testing.assert_close(ours(True), gradient, rtol=1e-2, atol=1e-2 * float(gradient.abs().max()))
    medians = alternate(ways, seconds=0)
    benchmark.extra_info["rows"] = {
        way: {
            "ms": round(1e3 * medians[way]),
            "of_stock_ratio": round(medians[way] / medians["stock, a step"], 3),
            "of_plain_torch_ratio": round(medians[way] / medians["plain torch"], 3),
            "peak_MiB": round(peak_mib(call), 1),
        }
        for way, call in ways.items()
    }
    benchmark.pedantic(lambda: None, rounds=1)
