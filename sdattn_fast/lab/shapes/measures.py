"""Measures of one picture of the shapes world: sharpness, fit of word maps, and what the judge says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .detector import ShapeDetection, detect
from .judge import judge_picture
from .world import ShapesScene

__all__ = ["MEASURES", "iou", "measure"]

MEASURES = ("sharpness", "map IoU", "map boundary F", "bound", "present", "all right")


def measure(
    scene: ShapesScene,
    image: np.ndarray,
    maps: Sequence[np.ndarray],
    detections: Sequence[ShapeDetection] | None = None,
) -> dict[str, float]:
    """`MEASURES` of one picture (64, 64, 3) uint8; maps: of each object's noun, (64, 64). NaN: nothing was found.
    detections: of `detect`, where they are known."""
    detections = detect(image) if detections is None else detections
    judged = judge_picture(scene, image, detections)
    fits = []
    for thing, heat in zip(scene.objects, maps, strict=True):
        drawn = next((d for d in detections if (d.colour, d.shape) == (thing.colour, thing.shape)), None)
        if drawn is not None:
            mask = heat > (heat.min() + heat.max()) / 2
            fits.append((iou(mask, drawn.mask), _boundary_f(mask, drawn.mask)))
    sharp = [s for s in (_sharpness(image, d) for d in detections) if np.isfinite(s)]
    fit, boundary = np.mean(fits, 0) if fits else (np.nan, np.nan)
    values = (np.mean(sharp) if sharp else np.nan, fit, boundary, judged.bound, judged.present, judged.right)
    return {name: float(value) for name, value in zip(MEASURES, values, strict=True)}


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def _sharpness(image: np.ndarray, thing: ShapeDetection) -> float:
    """Mean gradient along the boundary over the contrast across it, per pixel: 1/2 for a step between two pixels, as
    central differences see it."""
    from scipy import ndimage

    colours = image.astype(np.float64)
    inside = ndimage.binary_erosion(thing.mask, iterations=2)
    around = ndimage.binary_dilation(thing.mask, iterations=5) & ~ndimage.binary_dilation(thing.mask, iterations=3)
    if not inside.any() or not around.any():
        return float("nan")
    contrast = np.linalg.norm(np.median(colours[inside], 0) - np.median(colours[around], 0))
    slope = np.sqrt(sum((g**2).sum(-1) for g in np.gradient(colours, axis=(0, 1))))
    return float(slope[_boundary(thing.mask)].mean() / max(contrast, 1.0))


def _boundary(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask)


def _boundary_f(a: np.ndarray, b: np.ndarray, tolerance: float = 2.0) -> float:
    """Harmonic mean of the shares of either boundary within `tolerance` pixels of the other (Martin et al. 2004)."""
    from scipy import ndimage

    a, b = _boundary(a), _boundary(b)
    if not a.any() or not b.any():
        return 0.0
    precision = (ndimage.distance_transform_edt(~b)[a] <= tolerance).mean()
    recall = (ndimage.distance_transform_edt(~a)[b] <= tolerance).mean()
    return float(2 * precision * recall / max(1e-12, precision + recall))
