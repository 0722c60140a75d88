"""A training step of SD 1.5's UNet: true geometry, random weights, bfloat16, two pictures, a LoRA of rank 8 on all
attention projections or all weights trained, forward and backward, without the optimiser.

Ways: diffusers' AttnProcessor2_0, which runs no program; ours with the full one; the plain torch reference with the
full one. Memory is what the step's tensors take at the most, over the weights and what they keep (gradients, once
there, are counted as kept); time is taken in turn. No test asserts a figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdattn_fast import Program, Refinement, SalienceDropout

pytest.importorskip("diffusers")

FULL = Program(SalienceDropout(0.2), Refinement(threshold=0.3, sigma=0), "content")


@pytest.mark.parametrize("trained", ["LoRA", "all weights"])
@pytest.mark.filterwarnings("ignore:.*plain torch reference.*")
def test_memory_and_time(benchmark, peak_mib, trained):
    pytest.importorskip("peft")
    from peft import LoraConfig

    import sdattn_fast
    from sdattn_fast.cli.registry import build_random_unet, random_inputs

    unet = build_random_unet("sd15", torch.bfloat16).requires_grad_(trained == "all weights").train()
    if trained == "LoRA":
        unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    inputs = random_inputs(unet.config, 2, torch.bfloat16)
    protected = torch.ones(77, dtype=torch.bool)
    protected[1:16] = False

    def step() -> None:
        unet(**inputs).sample.float().square().mean().backward()

    def patched(backend: str) -> Callable[[], Any]:
        return lambda: sdattn_fast.apply(unet, FULL, protected=protected, backend=backend)

    ways: dict[str, Callable[[], Any]] = {"stock, no program": lambda: None, "ours": patched("auto")}
    ways["reference"] = patched("reference")
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    step()  # the gradients are there from here on
    for turn in range(4):
        for way, put in ways.items():
            patch = put()
            start = time.perf_counter()
            if turn == 0:
                peaks[way] = peak_mib(step)
            else:
                step()
                times[way].append(time.perf_counter() - start)
            if patch is not None:
                patch.remove()
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    benchmark.extra_info["rows"] = {
        way: {
            "peak_MiB": round(peaks[way], 1),
            "ms": round(1e3 * medians[way]),
            "of_stock_ratio": round(medians[way] / medians["stock, no program"], 3),
        }
        for way in ways
    }
    benchmark.pedantic(lambda: None, rounds=1)
