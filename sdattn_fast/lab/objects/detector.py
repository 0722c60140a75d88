"""Finds the pictograms in a picture: a small network gives each pixel a noun; connected pixels are an object.

The network is trained on true scenes (`sdattn_fast.lab.train --world objects --stage detector`), and knows nothing of
captions. Colours are the hue of most saturated pixels in the found mask. How often it errs on true scenes is measured
by `python -m sdattn_fast.studies.objects` and stated beside what it measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...guidance.pictures import signed_pictures
from .sprites import COLOURED, HUES, NOUNS, dominant_hue, sprite
from .world import SIDE, SMALLEST_SIDE

__all__ = ["PictogramDetection", "PictogramDetector", "PixelNouns", "roughened", "without_objects"]

_WHOLE = 0.6
_SURE = 0.6
_FARTHEST_HUE = 30.0


@dataclass(frozen=True)
class PictogramDetection:
    """One found object: its noun, its colour (None for nouns of one look, or a hue of none of the names), the middle of
    its mask (x, y) in pixels, and the mask, (64, 64) bool."""

    noun: str
    colour: str | None
    centre: tuple[float, float]
    mask: np.ndarray


class PixelNouns(nn.Module):
    """A small U-Net: (n, 3, 64, 64) in [-1, 1] to logits (n, 41, 64, 64), the background's first, then `NOUNS`."""

    def __init__(self, widths: Sequence[int] = (24, 48, 96, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(a, b) for a, b in zip((3, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(_block(low + high, low) for low, high in reversed(list(pairwise(widths))))
        self.out = nn.Conv2d(widths[0], 1 + len(NOUNS), 1)

    def forward(self, pictures: Tensor) -> Tensor:
        x, skips = pictures, []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else F.avg_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return self.out(x)


class PictogramDetector:
    """`detector(pictures)`: what is found in each picture.

    Example:
        >>> detector = PictogramDetector.load(folder)
        >>> [thing.noun for thing in detector([scene.image])[0]]
        ['owl', 'fire engine']
    """

    def __init__(self, network: PixelNouns) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, folder: Path | None = None) -> PictogramDetector:
        """From ``folder/detector.safetensors``, as training saves it; None: the one that ships.

        Raises: ImportError where sdattn-fast-lab is missing and no folder is given; OSError where the file is.
        """
        from safetensors.torch import load_file

        from ..pipeline import world_path

        folder = world_path("objects") if folder is None else folder
        network = PixelNouns()
        network.load_state_dict({key: t.float() for key, t in load_file(folder / "detector.safetensors").items()})
        return cls(network)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> list[list[PictogramDetection]]:
        """Of each picture (64, 64, 3) uint8, its objects from left to right.

        Raises: TypeError, ValueError: not such arrays.
        """
        for index, picture in enumerate(pictures):
            if not isinstance(picture, np.ndarray):
                raise TypeError(f"pictures[{index}]: expected a numpy array, got {type(picture).__name__}")
            if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
                raise ValueError(
                    f"pictures[{index}]: expected shape ({SIDE}, {SIDE}, 3) uint8, got {picture.shape} {picture.dtype}"
                )
        detections: list[list[PictogramDetection]] = []
        for start in range(0, len(pictures), 64):
            part = torch.from_numpy(np.stack(pictures[start : start + 64]))
            shares = self.network(signed_pictures(part)).softmax(1)
            best, nouns = shares.max(1)
            detections += [
                _objects(picture, noun.numpy(), sure.numpy())
                for picture, noun, sure in zip(pictures[start:], nouns, best, strict=False)
            ]
        return detections


def roughened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, 64, 64) in [-1, 1] as a trained model may draw them: some blurred, some noisy, some paler or
    darker, with blotches. What the network learns on, so that it depends on no detail of the true scenes."""
    n = len(pictures)

    def drawn(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)).to(pictures.device)

    def noise(side: int) -> Tensor:
        return torch.randn(n, 3, side, side, generator=generator).to(pictures.device)

    blurred = F.interpolate(F.interpolate(pictures, scale_factor=0.5, mode="area"), size=SIDE, mode="bilinear")
    x = torch.lerp(pictures, blurred, drawn(-0.2, 1.0))
    x = x * drawn(0.8, 1.1) + drawn(-0.1, 0.1)
    x = x + drawn(0, 0.12) * noise(SIDE) + drawn(0, 0.12) * F.interpolate(noise(SIDE // 4), size=SIDE, mode="bilinear")
    return x.clamp(-1, 1)


def without_objects(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Of pictures (n, 3, 64, 64), what holds no object: every other one noise of its own scale, the others in pieces of
    8x8 pixels that changed places. What the network learns to find nothing in, or it would see houses in noise."""
    n = len(pictures)
    scale = 2.0 * torch.rand(n, 1, 1, 1, generator=generator)
    noise = (scale * torch.randn(pictures.shape, generator=generator)).to(pictures).clamp(-1, 1)
    pieces = F.unfold(pictures, 8, stride=8)  # (n, 3 * 8 * 8, 64)
    order = torch.argsort(torch.rand(n, 1, pieces.shape[2], generator=generator), -1).to(pictures.device)
    scattered = F.fold(pieces.gather(2, order.expand_as(pieces)), SIDE, 8, stride=8)
    return torch.where((torch.arange(n, device=pictures.device) % 2 == 0)[:, None, None, None], noise, scattered)


def _objects(picture: np.ndarray, nouns: np.ndarray, sure: np.ndarray) -> list[PictogramDetection]:
    """Connected pixels of one noun that are enough for a whole object of the smallest size, and that the network is
    sure of."""
    from skimage import measure

    detections = []
    for index in np.unique(nouns[nouns > 0]):
        noun = NOUNS[index - 1]
        for region in measure.regionprops(measure.label(nouns == index, connectivity=2)):
            mask = np.zeros((SIDE, SIDE), bool)
            mask[tuple(region.coords.T)] = True
            if region.area >= _WHOLE * _smallest_area(noun) and sure[mask].mean() >= _SURE:
                y, x = region.centroid
                detections.append(PictogramDetection(noun, _colour(noun, picture[mask]), (x + 0.5, y + 0.5), mask))
    return sorted(detections, key=lambda d: d.centre)


def _colour(noun: str, pixels: np.ndarray) -> str | None:
    hue = dominant_hue(pixels) if noun in COLOURED else None
    if hue is None:
        return None
    away = {name: abs((hue - of + 180) % 360 - 180) for name, of in HUES.items()}
    nearest = min(away, key=away.__getitem__)
    return nearest if away[nearest] <= _FARTHEST_HUE else None


@cache
def _smallest_area(noun: str) -> float:
    """Pixels of the noun at the smallest side that a scene has it in."""
    solid = np.asarray(sprite(noun))[..., 3] >= 128
    return float(solid.mean() * SMALLEST_SIDE**2)


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
    )  # fmt: skip
