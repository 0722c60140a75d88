"""What captured maps cost: memory and time of a whole UNet step of SD 1.5, true geometry, random weights, two entries.

Memory: the most that tensors of a step take together over what was there before it (weights, inputs, text caches), by
torch's profiler; what is kept from the step is part of it. Ways: stock processors, no maps; a processor that keeps
every map, as Prompt-to-Prompt's store and DAAM's hooks do; one that keeps the 16x16 level's alone; ours without maps;
and ours with maps, the mean over heads of the prompts' entries at the 16x16 level. Time: ours with maps and without,
in turn. No test asserts a figure.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

MIB = 2**20
WAYS = ("stock, none", "every map kept", "16x16 kept", "ours, none", "ours, 16x16")


class StoringProcessor:
    """A stock processor that computes the probabilities and keeps them."""

    def __init__(self, stored: list[torch.Tensor]) -> None:
        self.stored = stored

    def __call__(self, attn: Any, x: Any, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Any:
        text = x if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(x))
        key, value = (attn.head_to_batch_dim(to(text)) for to in (attn.to_k, attn.to_v))
        p = attn.get_attention_scores(query, key, attention_mask)
        self.stored.append(p)
        return attn.to_out[0](attn.batch_to_head_dim(p @ value))


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "with_gradients"])
def test_memory_of_a_step(benchmark, peak_mib, gradients):
    import sdattn_fast
    from sdattn_fast.cli.registry import build_random_unet, random_inputs

    unet = build_random_unet("sd15", torch.bfloat16).requires_grad_(False)
    inputs, active = random_inputs(unet.config, 2, torch.bfloat16), torch.tensor([False, True])
    stock = dict(unet.attn_processors)
    rows: dict[str, tuple[float, float]] = {}
    for way in WAYS:
        stored: list[torch.Tensor] = []
        patch = None
        if way.startswith("ours"):
            capture = sdattn_fast.Capture() if way == "ours, 16x16" else None
            patch = sdattn_fast.apply(unet, active=active, capture=capture)
        for name, attn in unet.named_modules():
            at_16 = name.endswith("attn2") and attn.inner_dim == 1280 and "mid" not in name
            if (at_16 and way == "16x16 kept") or (name.endswith("attn2") and way == "every map kept"):
                attn.set_processor(StoringProcessor(stored))

        def maps(patch: Any = patch, stored: list[torch.Tensor] = stored, way: str = way) -> list[torch.Tensor]:
            return list(patch.maps.values()) if way == "ours, 16x16" else stored

        def step(stored: list[torch.Tensor] = stored, maps: Any = maps) -> None:
            stored.clear()
            with torch.set_grad_enabled(gradients):
                x = {**inputs, "sample": inputs["sample"].clone().requires_grad_(gradients)}
                out = unet(**x).sample
                if gradients:
                    (out.float().mean() + sum(m.float().mean() for m in maps())).backward()

        step()  # makes the text's caches
        stored.clear()
        rows[way] = (peak_mib(step), sum(m.numel() * m.element_size() for m in maps()) / MIB)
        if patch is not None:
            patch.remove()
        unet.set_attn_processor(dict(stock))
    benchmark.extra_info["rows"] = {
        way: {
            "maps_MiB": round(kept_mib, 2),
            "peak_MiB": round(peak, 1),
            "less_than_every_map_percent": round(100 * (1 - peak / rows["every map kept"][0]), 1),
        }
        for way, (peak, kept_mib) in rows.items()
    }
    benchmark.pedantic(lambda: None, rounds=1)


def test_time_of_a_step(benchmark):
    import sdattn_fast
    from sdattn_fast.cli.registry import build_random_unet, random_inputs, twin_of

    unet = build_random_unet("sd15", torch.bfloat16).requires_grad_(False)
    twin = twin_of(unet)
    inputs, active = random_inputs(unet.config, 2, torch.bfloat16), torch.tensor([False, True])
    sdattn_fast.apply(unet, active=active, capture=sdattn_fast.Capture())
    sdattn_fast.apply(twin, active=active)
    times: dict[str, list[float]] = {"with maps": [], "without": []}
    with torch.no_grad():
        for _ in range(8):
            for t, model in zip(times.values(), (unet, twin), strict=True):
                start = time.perf_counter()
                model(**inputs)
                t.append(time.perf_counter() - start)
    # The first of each makes the text's caches.
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    benchmark.extra_info["without_ms"] = round(1e3 * medians["without"])
    benchmark.extra_info["with_maps_ratio"] = round(medians["with maps"] / medians["without"], 3)
    benchmark.pedantic(lambda: None, rounds=1)
