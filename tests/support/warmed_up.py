"""`warm_up` on a GPU that is not there: Triton compiles for it, and nothing is launched.

Prints a line of JSON: {"first": kernels that `warm_up` compiled, "finite": whether latents were, in the call that lists
the launches, "bar": what the progress bar counted to, "later": what was compiled while the pipeline was called after
it, "launched": the kernels' names, "again": what a second `warm_up` compiled, "longer": what a third did, for a prompt
of 17 words}. A process of its own, as launch_path.py; TRITON_CACHE_DIR is an empty folder. `TRITON_INTERPRET=1 python
warmed_up.py pictures` prints {"same": whether a picture after a call whose launches were listed is what it would be}.
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
from sdattn_fast.backend.triton import compile_ahead, gpu, launch
from sdattn_fast.lab.pipeline import load_pipeline

STEPS = 2
PROMPT = "a red star left of a blue circle"
PROGRAM = Program(SalienceDropout(0.1), renormalize="content")


def main(target: str) -> None:
    if target == "pictures":
        print(json.dumps({"same": same_pictures()}))
        return
    fake_gpu.use(target)
    gpu.precision = lambda device: "tf32x3"
    gpu.interprets, gpu.OLDEST_INTERPRETER = lambda: True, (0, 0)  # so that CPU tensors are served
    compile_ahead.compiles = lambda: True
    pipe = small_pipeline().to(torch.float16)
    bars: list[Any] = []
    plain_bar = pipe.progress_bar
    pipe.progress_bar = lambda *args, **kwargs: bars.append(plain_bar(*args, **kwargs)) or bars[-1]
    finite: list[bool] = []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        finite.append(bool(values["latents"].isfinite().all()))
        return values

    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": STEPS}
    said: dict[str, Any] = {}
    with sdattn_fast.apply(pipe, PROGRAM, recipe="objects", backend="triton"):
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


def small_pipeline() -> Any:
    torch.manual_seed(0)
    pipe = load_pipeline()
    pipe.unet = _unet(attention_head_dim=2, cross_attention_dim=pipe.unet.config.cross_attention_dim)
    return pipe


def same_pictures() -> bool:
    pipe = small_pipeline()

    def draw() -> Any:
        noise = torch.Generator().manual_seed(0)
        return pipe(PROMPT, num_inference_steps=STEPS, output_type="latent", generator=noise).images

    def listed(kernel: Any, call: Any) -> bool:
        compile_ahead.zero_results(kernel, call[1])
        return True

    with sdattn_fast.apply(pipe, PROGRAM, recipe="objects", backend="triton"):
        plain = draw()
    with sdattn_fast.apply(pipe, PROGRAM, recipe="objects", backend="triton"):
        token = launch.taken.set(listed)
        empty = draw()
        launch.taken.reset(token)
        after = draw()
    # Not to the bit: where memory lies may choose other kernels of torch's.
    assert not torch.allclose(empty, plain, atol=1e-2)
    return torch.allclose(after, plain, rtol=0, atol=1e-4)


def entries() -> set[str]:
    """What is in Triton's cache."""
    return {path.name for path in Path(os.environ["TRITON_CACHE_DIR"]).iterdir()}


if __name__ == "__main__":
    main(sys.argv[1])
