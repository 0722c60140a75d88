"""The exact dense CRF at the size of the lattice's publications (320x240, 21 labels, 10 iterations) and a latent's.

The picture is scikit-image's astronaut; unaries are noisy blocks. Against it: brute force in float64 on a quarter of
the side, plain torch in chunks, and the permutohedral lattice (pydensecrf, where it is installed: `pip install
pydensecrf2`), whose marginals are compared with the exact ones as well. Taken in turn, medians; no test asserts a time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sdattn_fast.backend import cpu
from sdattn_fast.guidance.crf import PairwiseBilateral, PairwiseGaussian, dense_crf
from sdattn_fast.measure.timing import alternate

pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))

PAIRWISE = (PairwiseGaussian(3, 3), PairwiseBilateral(80, 10, 13))
ITERATIONS = 10


def _scene(height: int, width: int, labels: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    data = pytest.importorskip("skimage.data")
    transform = pytest.importorskip("skimage.transform")
    picture = transform.resize(data.astronaut(), (height, width), anti_aliasing=True)
    blocks = torch.randint(labels, (-(-height // 16), -(-width // 16)), generator=torch.Generator().manual_seed(0))
    blocks = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:height, :width]
    p = torch.full((labels, height, width), 0.4 / (labels - 1)).scatter(0, blocks[None], 0.6)
    return -p.log(), torch.from_numpy((picture * 255).astype(np.uint8))


def _by_lattice(unary: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    from pydensecrf.densecrf import DenseCRF2D

    labels, height, width = unary.shape
    crf = DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1).numpy()))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=np.ascontiguousarray(image.numpy()), compat=10)
    return torch.from_numpy(np.array(crf.inference(ITERATIONS))).view(labels, height, width)


@pytest.mark.parametrize("height, width, labels", [(240, 320, 21), (128, 128, 5), (64, 64, 5)])
def test_against_the_lattice(benchmark, height, width, labels):
    unary, image = _scene(height, width, labels)
    calls: dict[str, Callable[[], object]] = {"exact": lambda: dense_crf(unary, image, PAIRWISE, iterations=ITERATIONS)}
    try:
        lattice = _by_lattice(unary, image)
        calls["lattice"] = lambda: _by_lattice(unary, image)
    except ImportError:
        lattice = None
    medians = alternate(calls, seconds=0, least=3)
    benchmark.extra_info.update({f"{name}_ms": round(t * 1e3) for name, t in medians.items()})
    if lattice is not None:
        exact = dense_crf(unary, image, PAIRWISE, iterations=ITERATIONS)
        benchmark.extra_info["exact_over_lattice_ratio"] = round(medians["exact"] / medians["lattice"], 2)
        benchmark.extra_info["mean_difference"] = round(float((exact - lattice).abs().sum(0).mean() / 2), 4)
        benchmark.extra_info["labels_alike"] = round(float((exact.argmax(0) == lattice.argmax(0)).float().mean()), 4)
    benchmark.pedantic(calls["exact"], rounds=1)


def test_quarter_side_against_float64(benchmark):
    unary, image = _scene(60, 80)
    exact = dense_crf(unary.double(), image, PAIRWISE, iterations=ITERATIONS)
    got = dense_crf(unary, image, PAIRWISE, iterations=ITERATIONS, backend="cpu")
    benchmark.extra_info["largest_error"] = f"{float((got - exact).abs().max()):.1e}"
    medians = alternate(
        {
            name: lambda name=name: dense_crf(unary, image, PAIRWISE, iterations=2, backend=name)
            for name in ("cpu", "reference")
        },
        seconds=0,
    )
    benchmark.extra_info["kernel_over_plain_torch_ratio"] = round(medians["cpu"] / medians["reference"], 3)
    benchmark.pedantic(lambda: dense_crf(unary, image, PAIRWISE, backend="cpu"), rounds=3)
