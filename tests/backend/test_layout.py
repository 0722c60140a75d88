"""The CPU kernels on tensors in every layout. Triton's and CUDA's: tests/kernels/interpreted_layouts.py."""

from __future__ import annotations

import memory_layouts
import pytest
import torch
from memory_layouts import HEAD_DIMENSIONS, LAYOUTS
from poison import poison

from sdattn_fast.backend import cpu, layout


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


CHECKS = [
    memory_layouts.check_attention,
    memory_layouts.check_backward,
    memory_layouts.check_folded,
    memory_layouts.check_smooth,
]


@pytest.mark.parametrize("laid", LAYOUTS)
@pytest.mark.parametrize("d", HEAD_DIMENSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_any_layout_is_served_right_or_refused(check, dtype, d, laid):
    check(cpu, d, dtype, torch.device("cpu"), laid)


def test_a_layout_that_a_kernel_does_not_expect_is_refused():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"contiguous last dimension, got shape \(2, 3, 5, 4\)"):
        layout.row_strided(x.transpose(2, 3))
    with pytest.raises(ValueError, match=r"contiguous tensor, got shape \(3, 2, 4, 5\) with strides"):
        layout.address(x.transpose(0, 1))
    assert layout.row_strided(x)[1:] == layout.strided(x)[1:] == (60, 20, 5, 1)
    assert layout.address(None) == 0 and layout.strided(None) == (0,) * 5
