"""How well a map fits an object: by its true mask, or by CLIP without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..guidance.clip_score import ClipScorer
from .observation import Observation, sized

__all__ = ["Score", "clip_score", "iou_score", "masks_of", "text_of_word"]

Score = Callable[[Observation, Tensor], Tensor]


def iou_score(truth: Callable[[Observation], Sequence[np.ndarray | None]]) -> Score:
    """A score for `rank_heads`: intersection over union of maps with true masks.

    A map's mask is where it exceeds the middle between its smallest and largest value.

    Args:
        truth: Takes an `Observation` and returns each object's mask, a (height, width) bool array, or None if it was
            not drawn.

    Returns:
        The score.

    Examples:
        >>> ranking = rank_heads(seen, iou_score(segment), "mask IoU")  # segment: a segmentation model of yours
    """

    def score(observation: Observation, maps: Tensor) -> Tensor:
        rows = torch.full(maps.shape[:2], math.nan)
        for row, mask in enumerate(truth(observation)):
            if mask is not None:
                true = torch.from_numpy(np.ascontiguousarray(mask))
                predicted = masks_of(sized(maps[row], (int(true.shape[0]), int(true.shape[1]))))
                both, either = (predicted & true).sum((-1, -2)), (predicted | true).sum((-1, -2))
                rows[row] = both / either.clamp(min=1)
        return rows

    return score


def clip_score(clip: ClipScorer, texts: Callable[[Observation], Sequence[str]] | None = None) -> Score:
    """A score for `rank_heads` without true masks, by CLIP.

    It is the cosine of the object's text with the picture where only the mask is shown, less that where only the rest
    is shown. What is not shown has the picture's mean colour.

    Args:
        clip: The CLIP that judges.
        texts: Takes an `Observation` and returns a text for each object. None: "a photo of a" and the word.

    Returns:
        The score.

    Examples:
        >>> score = clip_score(ClipScorer.load("openai/clip-vit-large-patch14"))

    Source: PnP-OVSS, Luo et al. 2024, arXiv 2311.17095, scores masks by CLIP; that the hidden part counts against them
    is ours.
    """

    def score(observation: Observation, maps: Tensor) -> Tensor:
        picture = np.asarray(observation.picture.convert("RGB"))
        hidden = picture.mean((0, 1)).round().astype(np.uint8)
        names = [text_of_word(word) for word in observation.words] if texts is None else texts(observation)
        embeddings = clip.texts(list(names))
        rows = torch.empty(maps.shape[:2])
        for row in range(maps.shape[0]):
            masks = masks_of(sized(maps[row], picture.shape[:2])).numpy()[..., None]
            shown = clip.pictures([np.where(mask, picture, hidden) for mask in masks]) @ embeddings[row]
            rest = clip.pictures([np.where(mask, hidden, picture) for mask in masks]) @ embeddings[row]
            rows[row] = shown - rest
        return rows

    return score


def text_of_word(word: str) -> str:
    """What CLIP is asked about a word; the second circle, "circle (2)", is a circle."""
    return f"a photo of a {word.partition(' (')[0]}"


def masks_of(maps: Tensor) -> Tensor:
    """(..., height, width) bool: where a map passes the middle between its least and its greatest value."""
    return maps > (maps.amin((-1, -2), keepdim=True) + maps.amax((-1, -2), keepdim=True)) / 2
