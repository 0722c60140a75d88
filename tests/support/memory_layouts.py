"""The same numbers in other memory, and every function of a backend that hands addresses to a kernel, called with them.

A kernel that is handed a layout that it does not expect gives wrong numbers and no error. So whatever the layout, a
function gives what it gives for contiguous tensors, or raises.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sdattn_fast import Program
from sdattn_fast.backend.layout import has_rows
from sdattn_fast.plan import TokenSide, make_plan

__all__ = ["HEAD_DIMENSIONS", "LAYOUTS", "check_attention", "check_backward", "check_folded", "check_smooth"]

HEAD_DIMENSIONS = (1, 2, 3)
GRID = (3, 4)


def _sliced(x: Tensor, dim: int) -> Tensor:
    """Every other element of a tensor whose rest is NaN."""
    wide = torch.stack([x, torch.full_like(x, torch.nan)], dim + 1).flatten(dim, dim + 1)
    return wide[(slice(None),) * dim + (slice(None, None, 2),)]


# An expanded dimension repeats its first element.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "last two swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels sliced": lambda x: _sliced(x, 3),
    "rows sliced": lambda x: _sliced(x, 2),
    "batch expanded": lambda x: x[:1].expand_as(x),
    "heads expanded": lambda x: x[:, :1].expand_as(x),
    "channels expanded": lambda x: x[..., :1].expand_as(x),
}


class Inputs:
    """Of one call: b entries, h heads, a grid of m pixels, n tokens."""

    def __init__(self, d: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(d)
        b, h, m, n = 2, 3, GRID[0] * GRID[1], 7

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        self.query, self.grad = randn(b, h, m, d), randn(b, h, m, d)
        self.key, self.value = randn(b, h, n, d), randn(b, h, n, d)
        # Of a folded layer with h * d channels. A head dimension of 1 made its products come out permuted.
        self.hidden, self.wide_key, self.wide_value = (
            randn(b, 1, m, h * d),
            randn(b, h, n, h * d),
            randn(b, h, n, h * d),
        )
        gate = (torch.rand(b, 1, n, generator=generator) + 0.5).to(device)
        protected = (torch.arange(n) == 0).expand(b, n).to(device)
        side = TokenSide(b, h, n, device, gate=gate, protected=protected)
        # Nothing is decided, so that no rounding error can flip anything.
        self.plan = make_plan(Program(renormalize="content"), side)
        self.rows = self.plan.rows
        self.tolerance = 1e-5 if dtype == torch.float32 else 2e-2


def check_attention(backend: ModuleType, d: int, dtype: torch.dtype, device: torch.device, layout: str) -> None:
    """Query, key and value. A layout whose rows are not contiguous is refused, by `not_supported_reasons` and where the
    kernel is called."""
    c = Inputs(d, dtype, device)
    plain = [c.query, c.key, c.value]
    for which in range(3):
        tensors = [LAYOUTS[layout](x) if i == which else x for i, x in enumerate(plain)]
        reasons = backend.not_supported_reasons(*tensors, None, c.plan, False)
        if has_rows(tensors[which]):
            assert reasons == []
            plain = tensors
        else:
            assert "contiguous" in reasons[0]
            with pytest.raises(ValueError, match="contiguous"):
                backend.attention(*tensors, None, 0.3, c.rows)
    want = backend.attention(*(x.contiguous() for x in plain), None, 0.3, c.rows)[0]
    for keep_layout in (False, True):
        _close(backend.attention(*plain, None, 0.3, c.rows, keep_layout=keep_layout)[0], want, c)


def check_backward(backend: ModuleType, d: int, dtype: torch.dtype, device: torch.device, layout: str) -> None:
    """The gradient that comes in, in any layout; the inputs, in those that `attention` takes."""
    c = Inputs(d, dtype, device)
    inputs = [LAYOUTS[layout](x) for x in (c.query, c.key, c.value)]
    tensors = [*(x if has_rows(x) else x.contiguous() for x in inputs), LAYOUTS[layout](c.grad)]

    def run(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Any:
        return backend.backward(grad, None, query, key, value, None, 0.3, c.rows, None, [True] * 3 + [False] * 3)

    for got, want in zip(run(*tensors), run(*(x.contiguous() for x in tensors)), strict=True):
        if want is not None:
            _close(got, want, c)


def check_folded(backend: ModuleType, d: int, dtype: torch.dtype, device: torch.device, layout: str) -> None:
    """Keys and values as they come out of any product, hidden states as they come out of any layer, any bias."""
    c = Inputs(d, dtype, device)
    bias = torch.ones(1, 1, 1, c.wide_value.shape[3], device=device)
    tensors = [LAYOUTS[layout](x) for x in (c.hidden, c.wide_key, c.wide_value, bias)]

    def run(hidden: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        packed = backend.pack(key, value, c.rows)
        bias = bias[0, 0, 0].to(torch.float32 if device.type == "cpu" and dtype != torch.float16 else dtype)
        return backend.folded(hidden[:, 0], packed, True, None, bias, 0.3, c.rows)[0]

    _close(run(*tensors), run(*(x.contiguous() for x in tensors)), c)


def check_smooth(backend: ModuleType, d: int, dtype: torch.dtype, device: torch.device, layout: str) -> None:
    c = Inputs(d, dtype, device)
    x = LAYOUTS[layout](c.query)
    _close(backend.smooth(x, GRID, 0.8, 1, None), backend.smooth(x.contiguous(), GRID, 0.8, 1, None), c)


def _close(got: Tensor, want: Tensor, c: Inputs) -> None:
    torch.testing.assert_close(got, want, rtol=c.tolerance, atol=c.tolerance)
