"""The package as the kernels library loads it: against plain PyTorch, on a GPU where there is one."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import get_local_kernel

sdattn_fast = get_local_kernel(Path(__file__).resolve().parents[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "triton" if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "reference"
PROGRAM = sdattn_fast.Program(dropout=sdattn_fast.SalienceDropout(0.25), renormalize="content")


def inputs(requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 35, 40), (2, 3, 77, 40), (2, 3, 77, 40)
    made = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_(requires_grad) for shape in shapes]
    return made[0], made[1], made[2]


@pytest.mark.kernels_ci
def test_plain_attention() -> None:
    out = sdattn_fast.semantic_attention(*inputs(), backend=BACKEND)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs()), atol=2e-3, rtol=2e-3)


@pytest.mark.kernels_ci
def test_a_program_and_maps() -> None:
    how = {"gate": torch.linspace(0.0, 2.0, 77, device=DEVICE).expand(2, 77)}
    capture = sdattn_fast.Capture(tokens=(2, 5))
    found = sdattn_fast.semantic_attention(*inputs(), PROGRAM, capture=capture, backend=BACKEND, **how)
    expected = sdattn_fast.semantic_attention(*inputs(), PROGRAM, capture=capture, backend="reference", **how)
    assert found[1].shape == (2, 2, 35)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.kernels_ci
def test_gradients() -> None:
    grads = []
    for backend in (BACKEND, "reference"):
        leaves = inputs(requires_grad=True)
        sdattn_fast.semantic_attention(*leaves, PROGRAM, backend=backend).square().sum().backward()
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(*grads, atol=2e-2, rtol=2e-2)
