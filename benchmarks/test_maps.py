"""What captured maps cost: memory and time of a whole UNet step of SD 1.5, true geometry, random weights, two entries.

Memory: peak of the process, weights included, each way in a process of its own: stock processors, no maps; a processor
that keeps every map, as Prompt-to-Prompt's store and DAAM's hooks do; one that keeps the 16x16 level's alone; ours
without maps, whose text cache and folded projections take memory of their own; and ours with maps, the mean over heads
of the prompts' entries at the 16x16 level. Time: ours with maps and without, in turn. No test asserts a figure.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("diffusers")

WAYS = ("none", "every map kept", "16x16 kept", "ours without maps", "ours")

MEMORY = """
import json, sys, torch
import sdattn_fast
from sdattn_fast.cli.registry import build_unet, random_inputs
way, gradients = sys.argv[1], sys.argv[2] == "True"

class Keep:
    def __init__(self, kept): self.kept = kept
    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None):
        text = x if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(x))
        key, value = (attn.head_to_batch_dim(to(text)) for to in (attn.to_k, attn.to_v))
        p = attn.get_attention_scores(query, key, attention_mask)
        self.kept.append(p)
        return attn.to_out[0](attn.batch_to_head_dim(p @ value))

def high_water():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

unet = build_unet("sd15", torch.bfloat16).requires_grad_(False)
inputs = random_inputs(unet.config, 2, torch.bfloat16)
active = torch.tensor([False, True])
kept, patch = [], None
if way.startswith("ours"):
    capture = sdattn_fast.Capture() if way == "ours" else None
    patch = sdattn_fast.apply(unet, active=active, capture=capture)
elif way != "none":
    for name, attn in unet.named_modules():
        key_level = attn.inner_dim == 1280 and "mid" not in name if name.endswith("attn2") else False
        if name.endswith("attn2") and (way == "every map kept" or key_level):
            attn.set_processor(Keep(kept))
torch.set_grad_enabled(gradients)

def step():
    kept.clear()
    x = {**inputs, "sample": inputs["sample"].clone().requires_grad_(gradients)}
    out = unet(**x).sample
    if gradients:
        maps = list(patch.maps.values()) if way == "ours" else kept
        (out.float().mean() + sum(m.float().mean() for m in maps)).backward()

step()
open("/proc/self/clear_refs", "w").write("5")
before = high_water()
step()
maps = sum(m.numel() * m.element_size() for m in (patch.maps.values() if way == "ours" else kept))
print(json.dumps({"peak": high_water(), "before": before, "maps": maps / 2**20}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "with_gradients"])
def test_memory_of_a_step(benchmark, gradients):
    rows = {}
    for way in WAYS:
        done = subprocess.run([sys.executable, "-c", MEMORY, way, str(gradients)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        rows[way] = json.loads(done.stdout)
    none = rows["none"]["peak"]
    benchmark.extra_info["rows"] = {
        way: {
            "maps_MiB": round(row["maps"], 2),
            "peak_MiB": round(row["peak"]),
            "over_none_MiB": round(row["peak"] - none),
            "less_than_every_percent": round(100 * (1 - row["peak"] / rows["every map kept"]["peak"]), 1),
        }
        for way, row in rows.items()
    }
    benchmark.pedantic(lambda: None, rounds=1)


def test_time_of_a_step(benchmark):
    import sdattn_fast
    from sdattn_fast.cli.registry import build_unet, random_inputs, twin_of

    unet = build_unet("sd15", torch.bfloat16).requires_grad_(False)
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
