"""Every kernel at every shape of SD 1.5 and SDXL against the definition in float64, as tests/kernels/ compares them.

One call is one kernel of one backend at one shape, in a process of its own: a kernel that takes the device down with it
costs its own check.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from . import record
from .ground import DEVICE, DRY, LAYERS, SHAPES, TOKENS, NotRun, prompt_inputs, why_no
from .programs import defined, inputs, prepared, programs, smooths

__all__ = ["KERNELS", "NEAR_TIES", "check", "checks", "failed_check", "near_ties", "of_backend", "off"]

NEAR_TIES = 1e-3  # the share of rows that rounding may decide otherwise


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


def failed_check(backend: str, kernels: Iterable[str], shape: str) -> str | None:
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
        raise NotRun(record.reason(why))
    os.environ["SDATTN_TEST_BACKEND"] = "emulated-cuda" if DRY and backend == "cuda" else backend


def off(got: torch.Tensor, exact: torch.Tensor, allowed: float = NEAR_TIES) -> str | None:
    """What is wrong, or None. allowed: the share of rows that may disagree, see `near_ties`."""
    if got.shape != exact.shape or not got.isfinite().all():
        return "not finite, or of another shape"
    tolerance = 1e-3 if got.dtype == torch.float32 else 16 * torch.finfo(got.dtype).eps
    rows = ((got.double() - exact).abs() > tolerance * (1 + exact.abs())).any(-1)
    if rows.double().mean() > (0.1 if DRY else allowed):
        return f"disagrees with the definition on {int(rows.sum())} of {rows.numel()} rows"
    return None


def near_ties(program: str) -> float:
    """The share of a program's rows that may be decided otherwise: smoothing carries one into its neighbours."""
    return 0.03 if smooths(program) else NEAR_TIES


def _program(name: str, shape: str, dtype: torch.dtype) -> None:
    """The rows kernel, its selection looked at; and the very call that is timed, so that it is compiled by then."""
    import interpreted_rows as rows

    layer, (program, settings, text) = LAYERS[shape], programs()[name]
    side = prompt_inputs(2, **text)
    gate = {} if "gate" not in side else {"gate": side["gate"][:, None], "phrases": side["phrases"]}
    content = None if name == "plain" else text.get("content", 20)
    sizes = {"h": layer.num_heads, "m": layer.pixels, "n": TOKENS, "d": layer.head_dim, "dtype": dtype}
    rows.check(rows.case(**sizes, content=content, **gate), program, capture=settings.get("capture"))

    for maps in (False, True) if "capture" in settings else (False,):
        tensors = inputs(shape, 2, dtype)
        got = prepared(name, shape, tensors, rows.NAME, maps)()
        wrong = off(got, defined(name, shape, tensors, maps), near_ties(name))
        assert wrong is None, f"{'the maps: ' if maps else ''}{wrong}"
    if DEVICE.type == "cuda":
        # With more heads in a batch the kernel has other tiles.
        assert prepared(name, shape, inputs(shape, 16, dtype), rows.NAME)().isfinite().all()


def _smooth(shape: str, dtype: torch.dtype) -> None:
    import interpreted_smooth as smooth

    layer = LAYERS[shape]
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

    layer = LAYERS[shape]
    sizes = (2, layer.num_heads, layer.pixels, TOKENS, layer.head_dim, layer.head_dim)
    case = backward.Case(sizes, has=backward.EVERYTHING)
    with pytest.MonkeyPatch.context() as patch:
        backward.test_gradients_given_the_decisions(case, dtype, patch)


def _picture(shape: str, dtype: torch.dtype) -> None:
    """A pixel that hangs on a near-tie is left out."""
    from unsure_rows import unsure_rows

    from sdattn_fast import Program, Refinement, SalienceDropout, semantic_attention
    from sdattn_fast.reference import reference_attention

    layer = LAYERS[shape]
    program = Program(SalienceDropout(0.2, "space"), Refinement(1, 0.3, 0.0, "space"), "content")
    q, k, v = (
        torch.randn(2, layer.num_heads, s, layer.head_dim).to(DEVICE, dtype) for s in (layer.pixels, TOKENS, TOKENS)
    )
    protected = (torch.arange(TOKENS) > 20).expand(2, -1)
    side = {"grid": (layer.height, layer.width), "protected": protected.to(DEVICE)}
    got = semantic_attention(q, k, v, program, **side, backend="triton")
    exact, _ = reference_attention(q.double(), k.double(), v.double(), program, **side)
    unsure = unsure_rows(q.double().cpu(), k.double().cpu(), program, grid=side["grid"], protected=protected).to(DEVICE)
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
    **{name: (("triton", "cuda"), True, partial(_program, name)) for name in programs()},
    "smooth": (("triton", "cuda"), True, _smooth),
    "backward": (("triton",), True, _backward),
    "picture": (("triton",), True, _picture),
    "folded": (("triton",), False, _folded),
    "relevance": (("triton",), False, _relevance),
    "gaussian": (("triton",), False, _gaussian),
}
