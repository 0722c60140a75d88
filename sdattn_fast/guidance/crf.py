"""`dense_crf`: mean-field inference in a fully connected CRF with Gaussian kernels, exact rather than by lattice.

Parameters mean what they mean to pydensecrf's users, and the arithmetic is the authors' code's: kernels include the
pixel itself, are normalised symmetrically, N K N with N = diag(K 1)^(-1/2), and Q starts as the softmax of -unary. Only
the filter differs: they approximate it on a permutohedral lattice, here it is summed, as attention whose weights are
exp(-|f_i - f_j|^2 / 2). A Gaussian over positions alone is separable, so it is two small matrix products.

Source: Kraehenbuehl and Koltun 2011, "Efficient inference in fully connected CRFs with Gaussian edge potentials",
algorithm 1; the code is densecrf.cpp and pairwise.cpp of their densecrf; docs/design.md,
"A dense CRF is attention".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backend import KernelRefused, cpu, failure, remember_failure, triton, unavailable, warn_once
from ..program import finite_number

__all__ = ["PairwiseGaussian", "PairwiseBilateral", "dense_crf", "GaussianSums"]

MOST_LABELS, MOST_FEATURES, MOST_PIXELS = 32, 8, 131072


@dataclass(frozen=True)
class PairwiseGaussian:
    """A smoothness kernel of `dense_crf`, ``exp(-|p_i - p_j|^2 / (2 sxy^2))`` over positions p.

    Args:
        sxy: Standard deviation in pixels, one number or (along x, along y).
        compat: A number w: two different labels cost w (Potts). Or the costs themselves, an (L,) or (L, L) tensor; ``-w
            * torch.eye(L)`` is Potts. As in pydensecrf's `addPairwiseGaussian`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> labels = dense_crf(energies, pairwise=[PairwiseGaussian(sxy=2.0, compat=1.0)])
    """

    sxy: float | tuple[float, float] = 3.0
    compat: float | Tensor = 3.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sxy", _scales(f"{type(self).__name__}.sxy", self.sxy, 2))
        if not isinstance(self.compat, Tensor):
            object.__setattr__(self, "compat", finite_number(f"{type(self).__name__}.compat", self.compat))


@dataclass(frozen=True)
class PairwiseBilateral(PairwiseGaussian):
    """An appearance kernel of `dense_crf` over positions p and colours c.

    It is ``exp(-|p_i - p_j|^2 / (2 sxy^2) - |c_i - c_j|^2 / (2 srgb^2))``.

    Args:
        sxy: As in `PairwiseGaussian`.
        compat: As in `PairwiseGaussian`.
        srgb: Standard deviation of colours in the image's units, one number or one for each channel. As in pydensecrf's
            `addPairwiseBilateral`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> labels = dense_crf(energies, colours, [PairwiseBilateral(sxy=20.0, srgb=5.0)])
    """

    sxy: float | tuple[float, float] = 80.0
    compat: float | Tensor = 10.0
    srgb: float | tuple[float, ...] = 13.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "srgb", _scales("PairwiseBilateral.srgb", self.srgb, None))


def dense_crf(
    unary: Tensor,
    image: Tensor | None = None,
    pairwise: Sequence[PairwiseGaussian] | None = None,
    *,
    iterations: int = 5,
    backend: str = "auto",
) -> Tensor:
    """Mean-field inference in a fully connected conditional random field (CRF) with Gaussian kernels.

    Parameters and results are pydensecrf's, but the sums over all pairs of pixels are exact, where pydensecrf
    approximates them on a lattice. So time grows with the square of the number of pixels.

    Args:
        unary: (L, height, width) floating tensor of finite energies, -log of each label's probability: 2 to 32 labels,
            up to 131,072 pixels.
        image: (height, width, C) tensor of any real dtype, C <= 6, on the unary's device. Needed by
            `PairwiseBilateral`.
        pairwise: The kernels. None: ``(PairwiseGaussian(), PairwiseBilateral())``.
        iterations: Number of mean-field iterations, >= 0.
        backend: "auto" takes the fastest that serves the call. "triton" (GPUs) and "cpu" serve float32 without
            gradients. "reference" is plain PyTorch, in float32 at least, and differentiable in `unary`.

    Returns:
        (L, height, width) tensor of probabilities, in the unary's dtype.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value, or the named backend cannot serve the call.

    Examples:
        >>> labels = dense_crf(energies, colours, iterations=5).argmax(0)  # (height, width)

    Source: Krähenbühl and Koltun 2011, algorithm 1, arXiv 1210.5644; docs/design.md, "A dense CRF is attention".
    """
    pairwise = (PairwiseGaussian(), PairwiseBilateral()) if pairwise is None else pairwise
    _check(unary, image, pairwise, iterations)
    name = _choose(backend, unary, image)
    try:
        return _mean_field(unary, image, pairwise, iterations, name)
    except KernelRefused as error:
        if backend != "auto":
            raise
        remember_failure(error, name, unary.device, "dense_crf")
        warn_once(f"the plain torch reference serves dense_crf, because {name} could not launch {error.reason}.")
        return _mean_field(unary, image, pairwise, iterations, "reference")


def _mean_field(
    unary: Tensor, image: Tensor | None, pairwise: Sequence[PairwiseGaussian], iterations: int, backend: str
) -> Tensor:
    x = unary.to(torch.promote_types(unary.dtype, torch.float32))
    terms = [(_filter(term, x, image, backend), _compatibility(term, x)) for term in pairwise]
    q = torch.softmax(-x, 0)
    for _ in range(iterations):
        energy = x
        for filtered, compatible in terms:
            energy = energy + compatible(filtered(q))
        q = torch.softmax(-energy, 0)
    return q.to(unary.dtype)


class GaussianSums:
    """values (P, L) -> the sums over j of exp(-|f_i - f_j|^2 / 2) values_j, for features (P, d); never a (P, P) array.

    backend: "triton" or "cpu" (float32, d <= 8), or "reference" (any floating dtype, in chunks).
    """

    def __init__(self, features: Tensor, backend: str) -> None:
        self.backend = backend
        self.features = features
        if backend == "cpu":
            self.order = _neighbours_together(features)
            self.back = self.order.argsort()
            self.features = features[self.order]
        # All pairs left out weigh less than 1e-7 of a pixel's weight to itself, together.
        self.cutoff = 2 * math.log(max(1, len(features)) * 1e7)

    def __call__(self, values: Tensor) -> Tensor:
        if self.backend == "cpu":
            return cpu.gaussian_attention(self.features, values[self.order], self.cutoff)[self.back]
        if self.backend == "triton":
            return triton.gaussian_attention(self.features, values)
        rows = max(1, (1 << 20) // len(self.features))
        return torch.cat([self._weights(some) @ values for some in self.features.split(rows)])

    def _weights(self, rows: Tensor) -> Tensor:
        apart = torch.zeros(len(rows), len(self.features), dtype=rows.dtype, device=rows.device)
        for of_rows, of_all in zip(rows.unbind(1), self.features.unbind(1), strict=True):
            apart = apart + (of_rows[:, None] - of_all).square()
        return torch.exp(-0.5 * apart)


# Mean field's parts.


def _filter(term: PairwiseGaussian, unary: Tensor, image: Tensor | None, backend: str) -> Callable[[Tensor], Tensor]:
    """q (L, height, width) -> N K N q."""
    _, height, width = unary.shape
    how: Any = {"dtype": unary.dtype, "device": unary.device}
    x, y = (torch.arange(size, **how) / s for size, s in zip((width, height), _pair(term.sxy), strict=True))
    if not isinstance(term, PairwiseBilateral):
        along_x, along_y = (torch.exp(-0.5 * (at[:, None] - at).square()) for at in (x, y))
        norm = (along_y.sum(1)[:, None] * along_x.sum(1)).rsqrt()
        return lambda q: norm * (along_y @ (norm * q) @ along_x)
    assert image is not None
    colours = image.to(**how).flatten(0, 1) / torch.tensor(term.srgb, **how)
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)
    summed = GaussianSums(torch.cat([places, colours], 1), backend)
    norm = summed(torch.ones(height * width, 1, **how)).rsqrt()
    return lambda q: (norm * summed(norm * q.flatten(1).T)).T.reshape(q.shape)


def _compatibility(term: PairwiseGaussian, unary: Tensor) -> Callable[[Tensor], Tensor]:
    """What a filtered q adds to the energies."""
    if not isinstance(term.compat, Tensor):
        weight = -term.compat
        return lambda q: weight * q
    compat = term.compat.to(unary)
    if compat.dim() == 1:
        return lambda q: compat[:, None, None] * q
    return lambda q: torch.einsum("kl,lhw->khw", compat, q)


def _neighbours_together(features: Tensor) -> Tensor:
    """An order of the pixels in which runs are small in every feature: halved over and over along the widest one."""
    count = len(features)
    levels = max(0, math.ceil(math.log2(count / 16)))
    padded = math.ceil(count / 2**levels) * 2**levels
    order = torch.arange(padded, device=features.device).clamp(max=count - 1)
    real = torch.arange(padded, device=features.device) < count
    for level in range(levels):
        groups = features[order].view(2**level, -1, features.shape[1])
        widest = (groups.amax(1) - groups.amin(1)).argmax(1)
        keys = groups.gather(2, widest[:, None, None].expand(-1, groups.shape[1], 1))[..., 0]
        place = keys.argsort(1)
        order = order.view(2**level, -1).gather(1, place).flatten()
        real = real.view(2**level, -1).gather(1, place).flatten()
    return order[real]


# Checks.


def _check(unary: Any, image: Any, pairwise: Any, iterations: Any) -> None:
    if not isinstance(unary, Tensor):
        raise TypeError(f"unary: expected a torch.Tensor, got {type(unary).__name__}")
    if not unary.is_floating_point():
        raise TypeError(f"unary: expected a floating dtype, got {unary.dtype}")
    if unary.dim() != 3:
        raise ValueError(f"unary: expected (labels, height, width), got shape {tuple(unary.shape)}")
    labels, height, width = unary.shape
    if not 2 <= labels <= MOST_LABELS:
        raise ValueError(f"unary: expected 2 to {MOST_LABELS} labels, got {labels}")
    if not 1 <= height * width <= MOST_PIXELS:
        raise ValueError(f"unary: expected 1 to {MOST_PIXELS} pixels, got {height} x {width}")
    if not bool(torch.isfinite(unary).all()):
        raise ValueError("unary: expected finite energies, got NaN or infinity (clip probabilities before their log)")
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations: expected an int, got {type(iterations).__name__}")
    if iterations < 0:
        raise ValueError(f"iterations: expected at least 0, got {iterations}")
    if not isinstance(pairwise, Sequence) or any(not isinstance(term, PairwiseGaussian) for term in pairwise):
        raise TypeError(f"pairwise: expected PairwiseGaussian and PairwiseBilateral terms, got {pairwise!r}")
    for term in pairwise:
        if isinstance(term.compat, Tensor) and tuple(term.compat.shape) not in ((labels,), (labels, labels)):
            raise ValueError(
                f"compat: expected a number, ({labels},) or ({labels}, {labels}), got shape {tuple(term.compat.shape)}"
            )
        if isinstance(term, PairwiseBilateral):
            _check_image(image, unary, term)


def _check_image(image: Any, unary: Tensor, term: PairwiseBilateral) -> None:
    if image is None:
        raise ValueError("image: expected (height, width, channels), needed by PairwiseBilateral, got None")
    if not isinstance(image, Tensor):
        raise TypeError(f"image: expected a torch.Tensor, got {type(image).__name__}")
    if image.is_complex() or image.dtype == torch.bool:
        raise TypeError(f"image: expected a real dtype, got {image.dtype}")
    if image.dim() != 3 or image.shape[:2] != unary.shape[1:] or not 1 <= image.shape[2] <= MOST_FEATURES - 2:
        raise ValueError(
            f"image: expected ({unary.shape[1]}, {unary.shape[2]}, 1 to {MOST_FEATURES - 2}), got {tuple(image.shape)}"
        )
    if image.device != unary.device:
        raise ValueError(f"image: expected the unary's device {unary.device}, got {image.device}")
    if image.is_floating_point() and not bool(torch.isfinite(image).all()):
        raise ValueError("image: expected finite numbers, got NaN or infinity")
    if isinstance(term.srgb, tuple) and len(term.srgb) != image.shape[2]:
        raise ValueError(f"srgb: expected a number or {image.shape[2]} of them, got {len(term.srgb)}")


def _choose(backend: Any, unary: Tensor, image: Tensor | None) -> str:
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")
    if backend not in ("auto", "triton", "cpu", "reference"):
        raise ValueError(f"backend: expected 'auto', 'triton', 'cpu' or 'reference', got {backend!r}")
    if backend == "reference":
        return backend
    name = backend if backend != "auto" else "cpu" if unary.device.type == "cpu" else "triton"
    why_not = unavailable(name, unary.device)
    kind = "cuda" if name == "triton" and not triton.interprets() else "cpu"
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (unary, image))
    refusals = (
        (unary.device.type != kind, f"unary is on {unary.device}"),
        (unary.dtype != torch.float32, f"unary is {unary.dtype}, not float32"),
        (needs_grad, "gradients are asked for"),
        (why_not is not None, str(why_not)),
    )
    reasons = [reason for refused, reason in refusals if refused]
    if backend == "auto" and failure(name, unary.device, "dense_crf"):
        reasons.append("its kernel could not be launched")
    if reasons and backend != "auto":
        raise ValueError(f"backend: {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return "reference" if reasons else name


def _pair(sxy: Any) -> tuple[float, float]:
    return sxy if isinstance(sxy, tuple) else (sxy, sxy)


def _scales(name: str, given: Any, count: int | None) -> Any:
    numbers = given if isinstance(given, (tuple, list)) else (given,)
    if isinstance(given, (tuple, list)) and (not numbers or (count is not None and len(numbers) != count)):
        raise ValueError(f"{name}: expected a number or {count or 'some'} of them, got {given!r}")
    checked = tuple(finite_number(name, x) for x in numbers)
    if min(checked) <= 0:
        raise ValueError(f"{name}: expected more than 0, got {given!r}")
    return checked if isinstance(given, (tuple, list)) else checked[0]
