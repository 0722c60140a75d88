"""Every kernel at every shape of SD 1.5 and SDXL against the definition in float64, as tests/kernels/ compares them.

One call is one kernel of one backend at one shape, in a process of its own: a kernel that takes the device down with it
costs its own check.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import record
from .ground import DEVICE, DRY, SHAPES, TOKENS, NotRun, why_no

__all__ = ["CONTENT", "KERNELS", "check", "checks", "failed_check", "of_backend"]

ROOT = Path(__file__).resolve().parents[2]
CONTENT = (20, 35, 50)  # content tokens of 77, of a short, a middling and a long prompt


def checks() -> Iterator[tuple[str, str, str]]:
    """(backend, kernel, shape) of every check, the kernels first of which the most depends. "any": at its own sizes."""
    for kernel, (backends, everywhere, _) in KERNELS.items():
        for shape in SHAPES if everywhere else ("any",):
            for backend in backends:
                yield backend, kernel, shape


def check(backend: str, kernel: str, shape: str, dtype: str = "float16") -> None:
    """Raises AssertionError where a kernel is off; NotRun where its backend is not there."""
    import pytest
    from poison import poison

    of_backend(backend)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        KERNELS[kernel][2](shape, getattr(torch, dtype))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def failed_check(backend: str, kernels: tuple[str, ...], shape: str) -> str | None:
    """Why nothing that needs these kernels at this shape is to be timed, or None: each check must have passed."""
    done = record.last_status(record.read())
    for kernel in kernels:
        name = f"check/{backend}/{kernel}/{shape}"
        status = done[name]["status"] if name in done else record.NOT_RUN
        if status != record.PASSED:
            return f"{name}: {status}"
    return None


def of_backend(backend: str) -> None:
    """Has the modules in tests/kernels/ test this backend, in this process from here on. Raises: NotRun."""
    why = why_no(backend)
    if why is not None:
        raise NotRun(record.without_paths(why))
    os.environ["SDATTN_TEST_BACKEND"] = "emulated-cuda" if DRY and backend == "cuda" else backend


def _rows(shape: str, dtype: torch.dtype) -> None:
    import interpreted_rows as rows

    from sdattn_fast import Capture, Program

    layer = SHAPES[shape]
    sizes = {"h": layer.heads, "m": layer.pixels, "n": TOKENS, "d": layer.head_dim, "dtype": dtype}
    rows.check(rows.case(**sizes, content=None), Program())
    phrases = torch.full((2, TOKENS), -1)
    phrases[:, 2:5], phrases[:, 6:9] = 0, 1
    words = {"gate": torch.rand(2, 1, TOKENS) + 0.5, "phrases": phrases}
    for content in CONTENT[:1] if DRY else CONTENT:
        rows.check(rows.case(**sizes, content=content, **words), rows.FULL)
    rows.check(rows.case(**sizes, content=CONTENT[0], **words), rows.FULL, capture=Capture((1, 2, 3)))


def _smooth(shape: str, dtype: torch.dtype) -> None:
    import interpreted_smooth as smooth

    layer = SHAPES[shape]
    grid = (layer.height, layer.width)
    x = torch.randn(2, 2, layer.pixels, layer.head_dim, device=DEVICE).to(dtype)
    eps = torch.finfo(dtype).eps
    for sigma in (0.8,) if DRY else (0.5, 0.8, 1.0):
        got = smooth.backend.smooth(x, grid, sigma, 1, None)
        exact = smooth.by_scipy(x, grid, sigma, 1, None)
        torch.testing.assert_close(got.double(), exact, rtol=eps, atol=eps / 4 + 2e-6)


def _backward(shape: str, dtype: torch.dtype) -> None:
    import interpreted_backward as backward
    import pytest

    layer = SHAPES[shape]
    sizes = (2, layer.heads, layer.pixels, TOKENS, layer.head_dim, layer.head_dim)
    case = backward.Case(sizes, has=backward.EVERYTHING)
    with pytest.MonkeyPatch.context() as patch:
        backward.test_gradients_given_the_decisions(case, dtype, patch)


def _picture(shape: str, dtype: torch.dtype) -> None:
    """A pixel that hangs on a near-tie is left out, as tests/conftest.py finds them."""
    from sdattn_fast import Program, Refinement, SalienceDropout, semantic_attention
    from sdattn_fast.reference import reference_attention

    layer = SHAPES[shape]
    program = Program(SalienceDropout(0.2, "space"), Refinement(1, 0.3, 0.0, "space"), "content")
    q, k, v = (torch.randn(2, layer.heads, s, layer.head_dim).to(DEVICE, dtype) for s in (layer.pixels, TOKENS, TOKENS))
    protected = (torch.arange(TOKENS) > CONTENT[0]).expand(2, -1)
    side = {"grid": (layer.height, layer.width), "protected": protected.to(DEVICE)}
    got = semantic_attention(q, k, v, program, **side, backend="triton")
    exact, _ = reference_attention(q.double(), k.double(), v.double(), program, **side)
    rows = _conftest()._unsure_rows
    unsure = rows(q.double().cpu(), k.double().cpu(), program, grid=side["grid"], protected=protected).to(DEVICE)
    assert unsure.float().mean() < 0.3, "too many near-ties for the check to mean anything"
    tolerance = 4 * torch.finfo(dtype).eps
    assert got.isfinite().all()
    torch.testing.assert_close(got.double()[~unsure], exact[~unsure], atol=tolerance, rtol=tolerance)


def _folded(shape: str, dtype: torch.dtype) -> None:
    import interpreted_folded as folded

    for program in ("full",) if DRY else folded.PROGRAMS:
        for kind in ("query", "out", "both"):
            folded.test_kinds_and_programs(kind, program, dtype)


def _relevance(shape: str, dtype: torch.dtype) -> None:
    import interpreted_backward as backward

    backward.test_relevance_is_that_of_the_stored_map(True, None)
    backward.test_relevance_is_that_of_the_stored_map(False, [0, 2])


def _gaussian(shape: str, dtype: torch.dtype) -> None:
    import interpreted_refine as refine

    refine.test_gaussian_sums(*((63, 5, 21) if DRY else (4096, 5, 21)))


# Backends that have it; whether it is checked at every shape, or once at sizes of its own; the comparison.
KERNELS: dict[str, tuple[tuple[str, ...], bool, Callable[[str, torch.dtype], None]]] = {
    "rows": (("triton", "cuda"), True, _rows),
    "smooth": (("triton", "cuda"), True, _smooth),
    "backward": (("triton",), True, _backward),
    "picture": (("triton",), True, _picture),
    "folded": (("triton",), False, _folded),
    "relevance": (("triton",), False, _relevance),
    "gaussian": (("triton",), False, _gaussian),
}


def _conftest() -> ModuleType | Any:
    spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
