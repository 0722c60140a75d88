"""The dense CRF against brute force in float64: the P x P kernels, and the authors' update written out in numpy."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from sdattn_fast.backend import cpu
from sdattn_fast.guidance.crf import GaussianSums, PairwiseBilateral, PairwiseGaussian, _neighbours_together, dense_crf

needs_core = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))


@pytest.fixture(params=cpu.info().get("isas", []))
def isa(request):
    before = cpu.info()["isa"]
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def scene(labels=3, height=9, width=14, channels=3, seed=0):
    """A noisy guess of labels, and a picture of two colours with noise."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(labels), (height, width)).transpose(2, 0, 1)
    image = np.where(np.arange(width) < width // 2, 60, 180)[None, :, None] + random.normal(
        0, 9, (height, width, channels)
    )
    return torch.from_numpy(-np.log(p + 1e-6)), torch.from_numpy(image.clip(0, 255).astype(np.uint8))


def by_numpy(unary, image, terms, iterations):
    labels, height, width = unary.shape
    u = unary.double().numpy().reshape(labels, -1)
    y, x = np.divmod(np.arange(height * width), width)
    colours = image.double().numpy().reshape(height * width, -1)
    kernels = []
    for sx, sy, srgb, compat in terms:
        f = np.stack([x / sx, y / sy], 1)
        f = f if srgb is None else np.concatenate([f, colours / srgb], 1)
        k = np.exp(-0.5 * ((f[:, None] - f) ** 2).sum(-1))
        n = 1 / np.sqrt(k.sum(1))
        kernels.append((n[:, None] * k * n, compat))
    q = np.exp(-u) / np.exp(-u).sum(0)
    for _ in range(iterations):
        energy = u.copy()
        for k, compat in kernels:
            compat = np.asarray(compat, float)
            energy += (
                -compat * (q @ k) if compat.ndim == 0 else (np.diag(compat) if compat.ndim == 1 else compat) @ (q @ k)
            )
        q = np.exp(-energy - (-energy).max(0))
        q /= q.sum(0)
    return torch.from_numpy(q.reshape(labels, height, width))


@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 9, 14), (21, 5, 33), (32, 1, 70), (4, 16, 16)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_brute_force(shape, backend, isa):
    unary, image = scene(*shape)
    pairwise = (PairwiseGaussian((3, 2), 3), PairwiseBilateral(20, 10, 13))
    terms = [(3, 2, None, 3), (20, 20, 13, 10)]
    q = dense_crf(unary.float(), image, pairwise, iterations=5, backend=backend)
    assert q.dtype == torch.float32 and q.shape == shape
    torch.testing.assert_close(q.double(), by_numpy(unary, image, terms, 5), atol=2e-5, rtol=1e-4)
    exact = dense_crf(unary, image, pairwise, iterations=5)
    torch.testing.assert_close(exact, by_numpy(unary, image, terms, 5), atol=1e-12, rtol=1e-9)


def test_the_default_is_pydensecrfs_usual():
    unary, image = scene()
    terms = [(3, 3, None, 3), (80, 80, 13, 10)]
    torch.testing.assert_close(dense_crf(unary, image), by_numpy(unary, image, terms, 5), atol=1e-12, rtol=1e-9)


def test_compatibilities_and_scales_of_each_axis_and_channel():
    unary, image = scene(3)
    matrix, vector = torch.randn(3, 3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    srgb = (10.0, 20.0, 30.0)
    pairwise = (PairwiseGaussian(2, matrix), PairwiseBilateral((9, 4), vector, srgb))
    terms = [(2, 2, None, matrix.numpy()), (9, 4, np.array(srgb), vector.numpy())]
    torch.testing.assert_close(
        dense_crf(unary, image, pairwise, iterations=4), by_numpy(unary, image, terms, 4), atol=1e-12, rtol=1e-9
    )


def test_no_iteration_and_no_kernel_leave_the_guess():
    unary, image = scene()
    guess = torch.softmax(-unary, 0)
    torch.testing.assert_close(dense_crf(unary, image, iterations=0), guess)
    torch.testing.assert_close(dense_crf(unary, None, ()), guess)


@needs_core
@pytest.mark.parametrize("d", range(1, 9))
@pytest.mark.parametrize("pixels, labels", [(1, 1), (63, 2), (64, 32), (65, 5), (1000, 13)])
def test_sums_are_exact(d, pixels, labels, isa, monkeypatch):
    features, values = torch.randn(pixels, d) * 3, torch.randn(pixels, labels)
    empty = torch.empty_like
    monkeypatch.setattr(cpu.torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    got = GaussianSums(features, "cpu")(values)
    want = GaussianSums(features.double(), "reference")(values.double())
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


@needs_core
def test_what_is_far_is_left_out_without_a_trace(isa):
    """Two clouds so far apart that no pair between them counts: the same numbers as each cloud by itself."""
    near, far = torch.randn(500, 3), torch.randn(500, 3) + 1000
    values = torch.rand(1000, 4)
    both = GaussianSums(torch.cat([near, far]), "cpu")(values)
    torch.testing.assert_close(both[:500], GaussianSums(near, "cpu")(values[:500]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[500:], GaussianSums(far, "cpu")(values[500:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 1000, 4097])
def test_the_order_is_a_permutation_of_small_runs(count):
    features = torch.rand(count, 3)
    order = _neighbours_together(features)
    assert order.sort().values.tolist() == list(range(count))
    if count >= 1000:
        runs = features[order][: count // 64 * 64].view(-1, 64, 3)
        assert (runs.amax(1) - runs.amin(1)).mean() < 0.75


def test_gradients():
    unary, image = scene(3, 3, 4)
    unary.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: dense_crf(u, image, iterations=2), (unary,))
    with pytest.raises(ValueError, match="gradients are asked for"):
        dense_crf(unary.float(), image, backend="cpu")


MEMORY = """
import resource, torch
from sdattn_fast.guidance.crf import GaussianSums
features, values, peaks = torch.rand(16384, 5) * 50, torch.rand(16384, 4), []
for count in (4096, 16384):
    for backend in ("cpu", "reference"):
        GaussianSums(features[:count], backend)(values[:count])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[1] - peaks[0])
"""


@needs_core
def test_memory_does_not_grow_with_pixels_squared():
    """16,384 pixels: a P x P array would be 1 GiB; what the allocator and the libraries keep is not ours to bound."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, check=True)
    assert float(done.stdout) < 768


def test_bad_input():
    unary, image = scene()
    spoilt = unary.clone()
    spoilt[1, 2, 3] = math.nan
    for error, message, call in (
        (ValueError, "unary: expected finite", lambda: dense_crf(spoilt, image)),
        (ValueError, "unary: expected 2 to 32 labels, got 1", lambda: dense_crf(unary[:1], image)),
        (ValueError, "unary: expected 2 to 32 labels, got 33", lambda: dense_crf(torch.zeros(33, 2, 2), image)),
        (ValueError, "unary: expected 1 to 131072 pixels, got 0 x 14", lambda: dense_crf(unary[:, :0], image[:0])),
        (ValueError, r"unary: expected \(labels, height, width\)", lambda: dense_crf(unary[0], image)),
        (TypeError, "unary: expected a floating dtype", lambda: dense_crf(unary.int(), image)),
        (TypeError, "unary: expected a torch.Tensor", lambda: dense_crf(3, image)),
        (ValueError, "image: expected .*got None", lambda: dense_crf(unary)),
        (ValueError, r"image: expected \(9, 14, 1 to 6\)", lambda: dense_crf(unary, image[:3])),
        (ValueError, "image: expected finite", lambda: dense_crf(unary, image / 0.0)),
        (ValueError, "iterations: expected at least 0", lambda: dense_crf(unary, image, iterations=-1)),
        (TypeError, "iterations: expected an int", lambda: dense_crf(unary, image, iterations=2.0)),
        (TypeError, "pairwise: expected", lambda: dense_crf(unary, image, (3,))),
        (
            ValueError,
            "compat: expected a number",
            lambda: dense_crf(unary, image, (PairwiseGaussian(3, torch.ones(2)),)),
        ),
        (
            ValueError,
            "srgb: expected a number or 3",
            lambda: dense_crf(unary, image, (PairwiseBilateral(9, 1, (1, 2)),)),
        ),
        (ValueError, "sxy: expected more than 0", lambda: PairwiseGaussian(0)),
        (ValueError, "sxy: expected a number or 2", lambda: PairwiseGaussian((1, 2, 3))),
        (ValueError, "srgb: expected a finite number", lambda: PairwiseBilateral(srgb=math.nan)),
        (TypeError, "compat: expected a number", lambda: PairwiseGaussian(3, "much")),
        (ValueError, "backend: expected", lambda: dense_crf(unary, image, backend="cuda")),
        (ValueError, "float64, not float32", lambda: dense_crf(unary, image, backend="cpu")),
    ):
        with pytest.raises(error, match=message):
            call()
