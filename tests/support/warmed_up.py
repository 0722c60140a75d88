"""`warm_up` on a GPU that is not there: Triton compiles for it, and nothing is launched.

Prints a line of JSON: {"first": kernels that `warm_up` compiled, "finite": whether latents were, in the call that lists
the launches, "bar": what the progress bar counted to, "later": what was compiled while the pipeline was called after
it, "launched": the kernels' names, "again": what a second `warm_up` compiled, "longer": what a third did, for a prompt
of 17 words}. A process of its own, as launch_path.py; TRITON_CACHE_DIR is an empty folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import fake_gpu
import pytest
import torch
from poison import poison
from tiny_models import _unet

import sdattn_fast
from sdattn_fast import Program, SalienceDropout
from sdattn_fast.backend.triton import compile_ahead, gpu
from sdattn_fast.lab.pipeline import load_pipeline

STEPS = 2


def main(target: str) -> None:
    fake_gpu.use(target)
    gpu.precision = lambda device: "tf32x3"
    gpu.interprets, gpu._OLDEST_INTERPRETER = lambda: True, (0, 0)  # so that CPU tensors are served
    compile_ahead.compiles = lambda: True
    pipe = load_pipeline()
    pipe.unet = _unet(attention_head_dim=2, cross_attention_dim=pipe.unet.config.cross_attention_dim)
    pipe.to(torch.float16)
    bars: list[Any] = []
    plain_bar = pipe.progress_bar
    pipe.progress_bar = lambda *args, **kwargs: bars.append(plain_bar(*args, **kwargs)) or bars[-1]
    finite: list[bool] = []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        finite.append(bool(values["latents"].isfinite().all()))
        return values

    program = Program(SalienceDropout(0.1), renormalize="content")
    call: dict[str, Any] = {"prompt": "a red star left of a blue circle", "num_inference_steps": STEPS}
    said: dict[str, Any] = {}
    with sdattn_fast.apply(pipe, program, recipe="objects", backend="triton"):
        with pytest.MonkeyPatch.context() as patch:
            poison(patch)
            said["first"] = sdattn_fast.warm_up(pipe, callback_on_step_end=look, **call)
        said["finite"] = finite[:STEPS]
        said["bar"] = next(bar.n for bar in bars if "compiling" in (getattr(bar, "desc", None) or ""))
        compiled = entries()
        fake_gpu.launches.clear()
        pipe(**call, output_type="latent")
        said["later"] = len(entries() - compiled)
        said["launched"] = sorted({name for name, *_ in fake_gpu.launches})
        said["again"] = sdattn_fast.warm_up(pipe, **call)
        said["longer"] = sdattn_fast.warm_up(pipe, **call | {"prompt": " ".join(["red"] * 17)})
    print(json.dumps(said))


def entries() -> set[str]:
    """What is in Triton's cache."""
    return {path.name for path in Path(os.environ["TRITON_CACHE_DIR"]).iterdir()}


if __name__ == "__main__":
    main(sys.argv[1])
