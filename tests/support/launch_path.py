"""Launches every kernel through the backend on a GPU that is not there, and prints what the driver was handed.

A process of its own, since Triton's driver is one for all. `python launch_path.py sm_90` prints a line of JSON for each
launch, {kernel, grid, arguments}: tensors by the names that this file has for them, "?" for others, the rest as it is.
`TRITON_INTERPRET=1 python launch_path.py writes` runs them in the interpreter and prints {kernel, writes} for each: the
parameters whose tensors it changed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import fake_gpu
import torch

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.backend import triton as backend
from sdattn_fast.backend.triton import gpu, launch
from sdattn_fast.plan import TokenSide, make_plan

B, H, HEIGHT, WIDTH, N, D = 2, 3, 1, 33, 77, 40
M = HEIGHT * WIDTH


def main(target: str) -> None:
    if target == "writes":
        watch()
        launch_all(rare=True)
        return
    fake_gpu.use(target)
    gpu.precision = lambda device: "tf32x3"
    names = launch_all()
    for kernel, grid, arguments in fake_gpu.launches:
        named = {argument: _name(x, names) for argument, x in arguments.items()}
        print(json.dumps({"kernel": kernel, "grid": grid, "arguments": named}))


def launch_all(rare: bool = False) -> dict[str, Any]:
    """The tensors by names. rare: also the calls that write what the others do not."""
    q, k, v = (torch.randn(B, s, H, D, dtype=torch.float16).transpose(1, 2) for s in (M, N, N))
    names = {"query": q, "key": k, "value": v}
    protected = torch.arange(N).expand(B, N) > 12
    side = TokenSide(B, H, N, q.device, torch.ones(B, 1, N), torch.arange(N).repeat(B, 1) // 3, protected)
    full = Program(SalienceDropout(0.3), Refinement(1, 0.2, 0.0), "content")
    plan = make_plan(full, side, Capture((1, 2), reduce="none"))
    rows = plan.rows
    names |= {name: x for name, x in vars(rows).items() if isinstance(x, torch.Tensor)}

    bias = torch.randn(1, H, 1, N)
    out, maps, bits = backend.attention(q, k, v, bias, 0.1, rows, return_bits=True, keep_layout=True)
    names |= {"out": out, "maps": maps, "bits": bits, "bias": bias}
    grad_out, sink_tokens = torch.randn(B, M, H, D, dtype=torch.float16).transpose(1, 2), torch.tensor([1, 2]).int()
    names |= {"grad_out": grad_out}
    grads = backend.backward(
        grad_out, torch.ones(maps.shape), q, k, v, bias.expand(B, H, M, N), 0.1, rows, bits, (True,) * 6, sink_tokens
    )
    names |= dict(zip(("of_query", "of_key", "of_value", "of_bias", "of_gate", "relevance"), grads, strict=True))

    x = torch.randn(B, M, 64, dtype=torch.float16)
    packed = backend.pack(*(torch.randn(B, H, N, 64, dtype=torch.float16) for _ in range(2)), rows)
    backend.folded(x, packed, True, None, None, 0.1, replace(rows, capture_tokens=None))
    names |= {"x": x, "packed_key": packed.key}

    smoothed = torch.randn(B, H, M, D)
    backend.smooth(smoothed, (HEIGHT, WIDTH), 0.8, 1, None)
    names |= {"smoothed": smoothed}

    spatial = Program(SalienceDropout(0.3, "space"), Refinement(2, 0.2, 0.8, "space"), "row")
    picture = make_plan(spatial, side)
    backend.picture_attention(q, k, v, None, 0.1, picture.rows, picture.picture, (HEIGHT, WIDTH))
    one = make_plan(Program(SalienceDropout(0.3, "space"), Refinement(1, 0.2, 0.0, "space")), side)
    backend.picture_attention(q, k, v, None, 0.1, one.rows, one.picture, (HEIGHT, WIDTH))
    backend.gaussian_attention(torch.randn(50, 5), torch.randn(50, 3))
    if rare:
        of_maps, row = torch.ones(maps.shape), torch.randn(1, 1, 1, N)
        backend.backward(grad_out, of_maps, q, k, v, row, 0.1, rows, bits, (True,) * 6, sink_tokens)
        kept = make_plan(Program(refine=Refinement(1, 0.2, 0.0, "space")), side, Capture((1, 2), reduce="none"))
        backend.picture_attention(q, k, v, None, 0.1, kept.rows, kept.picture, (HEIGHT, WIDTH))
    return names


def watch() -> None:
    """Every launch prints what it changes."""
    make = launch.launch

    def watched(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        tensors = {n: x for n, x in zip(kernel.arg_names, arguments, strict=False) if isinstance(x, torch.Tensor)}
        before = {name: x.clone() for name, x in tensors.items()}
        make(kernel, programs, arguments, options)
        writes = [name for name, x in tensors.items() if not torch.equal(x.nan_to_num(7), before[name].nan_to_num(7))]
        print(json.dumps({"kernel": kernel.__name__, "writes": writes}))

    launch.launch = watched


def _name(x: Any, names: dict[str, Any]) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    # A view is its tensor's: what is compared is where it begins.
    found = [name for name, y in names.items() if isinstance(y, torch.Tensor) and y.data_ptr() == x.data_ptr()]
    return found[0] if found else "?"


if __name__ == "__main__":
    main(sys.argv[1])
