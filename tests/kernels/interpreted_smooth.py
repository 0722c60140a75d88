"""The smoothing kernel against scipy. Run as interpreted_rows.py is."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from tested_backend import DEVICE, INTERPRETED, backend


def by_scipy(x, grid, sigma, times, where):
    b, h, m, c = x.shape
    y = x.double().cpu().numpy().reshape(b, h, *grid, c).copy()
    for i in np.ndindex(b, h):
        if where is None or where[i]:
            for _ in range(times):
                y[i] = scipy.ndimage.gaussian_filter(y[i], (sigma, sigma, 0))
    return torch.from_numpy(y.reshape(b, h, m, c)).to(DEVICE)


@pytest.mark.parametrize("grid,c", [((4, 4), 40), ((8, 8), 7), ((5, 9), 1), ((1, 6), 3), ((2, 3), 160), ((12, 11), 33)])
@pytest.mark.parametrize("sigma,times", [(0.8, 1), (0.3, 2), (2.5, 1)])
def test_smooth_is_scipys(grid, c, sigma, times):
    x = torch.randn(2, 2, grid[0] * grid[1], c, device=DEVICE)
    got = backend.smooth(x, grid, sigma, times, None)
    assert got.shape == x.shape and got.dtype == x.dtype
    torch.testing.assert_close(got.double(), by_scipy(x, grid, sigma, times, None), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smooth_rounds_once(dtype):
    x = torch.randn(1, 2, 48, 5, device=DEVICE).to(dtype)
    got = backend.smooth(x, (6, 8), 1.0, 3, None)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), by_scipy(x, (6, 8), 1.0, 3, None), rtol=eps, atol=eps / 16)


def test_smooth_copies_where_it_is_told():
    where = torch.tensor([[True, False, True], [False, False, True]], device=DEVICE)
    x = torch.randn(2, 3, 20, 4, device=DEVICE)
    got = backend.smooth(x, (4, 5), 0.8, 2, where)
    torch.testing.assert_close(got.double(), by_scipy(x, (4, 5), 0.8, 2, where.cpu()), rtol=1e-5, atol=2e-6)
    assert torch.equal(got[~where], x[~where]) and got.data_ptr() != x.data_ptr()
    one = backend.smooth(x, (4, 5), 0.8, 2, where[:, :1])
    torch.testing.assert_close(
        one.double(), by_scipy(x, (4, 5), 0.8, 2, where[:, :1].expand(2, 3).cpu()), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (40, 3)])
def test_a_radius_larger_than_the_picture(grid):
    x = torch.randn(1, 2, grid[0] * grid[1], 8, device=DEVICE)
    exact = by_scipy(x, grid, 6.0, 1, None)
    torch.testing.assert_close(backend.smooth(x, grid, 6.0, 1, None).double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("c", [33] if INTERPRETED else [8, 40, 72, 160, 33])  # there addresses mean nothing
def test_channels_of_every_alignment(c, offset, dtype):
    x = torch.randn(2 * 70 * c + offset, device=DEVICE).to(dtype)[offset:].view(1, 2, 70, c)
    eps = torch.finfo(dtype).eps
    got = backend.smooth(x, (5, 14), 0.8, 1, None)
    torch.testing.assert_close(
        got.double(), by_scipy(x, (5, 14), 0.8, 1, None), rtol=max(eps, 1e-5), atol=eps / 4 + 2e-6
    )


def test_a_nan_stays_within_the_radius():
    x = torch.randn(1, 1, 20 * 30, 8, device=DEVICE)
    x[0, 0, 10 * 30 + 17, 3] = float("nan")
    bad = backend.smooth(x, (20, 30), 0.8, 1, None).isnan()[0, 0].view(20, 30, 8)
    assert bad[7:14, 14:21, 3].all() and bad.sum() == 49


def test_smooth_of_strided_and_empty():
    x = torch.randn(2, 3, 6, 20, device=DEVICE).transpose(-1, -2)
    torch.testing.assert_close(
        backend.smooth(x, (4, 5), 0.8, 1, None).double(), by_scipy(x, (4, 5), 0.8, 1, None), rtol=1e-5, atol=2e-6
    )
    assert backend.smooth(x[:0], (4, 5), 0.8, 1, None).shape == (0, 3, 20, 6)
    assert torch.equal(backend.smooth(x, (4, 5), 0.0, 1, None), x)
