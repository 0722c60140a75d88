"""Calls of many kinds in a random order, on a GPU that is not there: every launch, bound or not, is what its call would
be by itself. Prints {"plain": how many were not bound, "bound": how many were, "straight": how many of these went past
`launch_bound`, from a BoundAttention}. A process of its own, as launch_path.py.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import fake_gpu
import torch
from sdattn_fast.kernels import rows_kernel
from torch import Tensor

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.backend import triton as backend
from sdattn_fast.backend.triton import gpu, launch
from sdattn_fast.backend.triton.rows import rows_call
from sdattn_fast.plan import TokenSide, make_plan

FULL = Program(SalienceDropout(0.3), Refinement(1, 0.2, 0.0), "content")
RANDOM = Program(SalienceDropout(0.3, mode="random"))
asked: list[tuple[Any, Any, Any]] = []  # tensors, the call's own description, the launch that was returned


def main(target: str) -> None:
    fake_gpu.use(target)
    gpu.precision = lambda device: "tf32x3"
    launch_bound = launch.launch_bound

    def listening(kernel: Any, tensors: Any, key: Any, call: Any) -> Any:
        asked.append((kernel, list(tensors), call()))
        return launch_bound(kernel, tensors, key, call)

    launch.launch_bound = listening
    draw = random.Random(0)
    calls = [make() for make in CALLS for _ in range(2)]
    counts = {"plain": 0, "bound": 0, "straight": 0}
    for call in calls + draw.choices(calls, k=200):
        fake_gpu.launches.clear()
        asked.clear()
        described = call()
        if not asked:  # a BoundAttention went straight to its launch
            counts["straight"] += 1
            asked.append((rows_kernel, described[1][:15], described))
        assert len(asked) == len(fake_gpu.launches) > 0
        for one, (name, grid, arguments) in zip(asked, fake_gpu.launches, strict=True):
            kernel, tensors, (programs, described, options) = one
            assert name == kernel.__name__ and grid == (programs, 1, 1)
            given = list(arguments.values())
            bound = all(x is None or isinstance(x, int) for x in given[: len(tensors)])
            counts["bound" if bound else "plain"] += 1
            for x, want in zip(given, tensors, strict=False):
                address = None if want is None else want.data_ptr()
                assert address == (x.data_ptr() if isinstance(x, Tensor) else x)
            numbers = described[len(tensors) :]
            assert tuple(given[len(tensors) : len(described)]) == numbers
            for constant in list(arguments)[len(described) :]:
                assert arguments[constant] == options[constant], constant
    print(json.dumps(counts))


def rows(program: Program, **of: Any) -> Any:
    """A call of `attention` on fresh tensors each time."""
    b, h, m, n, d = (of.get(name, default) for name, default in zip("bhmnd", (2, 3, 33, 77, 40), strict=True))
    dtype, capture, seeded = of.get("dtype", torch.float16), of.get("capture"), program is RANDOM
    protected = torch.arange(n).expand(b, n) > of.get("content", 12)
    side = TokenSide(b, h, n, torch.device("cpu"), of.get("gate"), None, protected, heads=of.get("heads"))
    plan = make_plan(program, side, capture)
    key, value = (torch.randn(b, n, h, d).to(dtype).transpose(1, 2) for _ in range(2))
    seeds = torch.arange(4 + b)

    def call() -> None:
        query = torch.randn(b, m, h, d + of.get("pad", 0)).to(dtype)[..., :d].transpose(1, 2)
        query = aside(query) if of.get("unaligned") else query
        seed = seeds[of.get("which", 0) :][:b]
        plan_now = plan.rows.with_seed(seed) if seeded else plan.rows
        bias = of.get("bias")
        backend.attention(query, key, value, bias, of.get("scale", 0.1), plan_now, of.get("bits", False), True)

    return call


def again(program: Program, **of: Any) -> Any:
    """A call of `BoundAttention` on a fresh query, now and then at an address that is no multiple of 16; gives what the
    rows kernel should be launched with."""
    key, value = (torch.randn(2, 77, 3, 40).half().transpose(1, 2) for _ in range(2))
    side = TokenSide(2, 3, 77, torch.device("cpu"), None, None, torch.arange(77).expand(2, 77) > 12)
    plan = make_plan(program, side, of.get("capture"))
    bound = backend.BoundAttention(key, value, 0.1, plan.rows)
    turn = [0]

    def call() -> Any:
        turn[0] += 1
        query = torch.randn(2, 33, 3, 40).half().transpose(1, 2)
        query = aside(query) if turn[0] % 4 == 3 else query
        seed = turn[0] + torch.arange(2) if program is RANDOM else None
        out, maps = bound(query, seed)
        now = plan.rows if seed is None else plan.rows.with_seed(seed)
        return rows_call(query, key, value, None, 0.1, now, out, maps, None)

    return call


def aside(x: Tensor) -> Tensor:
    """x at an address that is no multiple of 16."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return memory.as_strided(x.shape, x.stride()).copy_(x)


def smooth(**of: Any) -> Any:
    where = torch.tensor([[True, False, True]] * 2) if of.get("where") else None

    def call() -> None:
        x = torch.randn(2, 12, 3, 40).to(of.get("dtype", torch.float16)).transpose(1, 2)
        backend.smooth(x, of.get("grid", (3, 4)), of.get("sigma", 0.8), of.get("times", 1), where)

    return call


CALLS = [
    *(lambda of=of: rows(Program(), **of) for of in ({}, {"m": 64}, {"dtype": torch.float32}, {"pad": 3})),
    *(
        lambda of=of: rows(FULL, **of)
        for of in (
            {}, {"content": 30}, {"scale": 0.2}, {"gate": torch.ones(2, 1, 77)}, {"gate": torch.ones(2, 3, 77)},
            {"heads": torch.tensor([True, False, True])}, {"bits": True}, {"bias": torch.randn(1, 1, 1, 77)},
            {"bias": torch.randn(33, 77).half()}, {"unaligned": True}, {"capture": Capture((1, 2))},
            {"capture": Capture((1, 2, 3))}, {"capture": Capture((1, 2), "softmax", "none")}, {"b": 1}, {"n": 20},
        )
    ),
    *(lambda which=which: rows(RANDOM, which=which) for which in (0, 1)),
    lambda: again(FULL), lambda: again(RANDOM), lambda: again(FULL, capture=Capture((1, 2), reduce="none")),
    *(
        lambda of=of: smooth(**of)
        for of in ({}, {"where": True}, {"sigma": 0.5}, {"grid": (4, 3)}, {"times": 2}, {"dtype": torch.float32})
    ),
]  # fmt: skip

if __name__ == "__main__":
    main(sys.argv[1])
