"""A learned score of objects' maps: a small network that was trained to tell which objects a noisy latent holds.

Learn-to-Steer trains a classifier of relations on the cross-attention maps of real pictures and uses its loss between
sampling steps. Here it tells of every object that the caption names whether it is there, in its colour; the maps are
those of true scenes that were made noisy, with captions of which a share is wrong.

Source: Yiflach, Atzmon and Chechik 2025, "Data-Driven Loss Functions for Inference-Time Optimization in Text-to-Image
Generation", arXiv 2509.02295.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...guidance.relevance import Seen
from ...guidance.token_maps import PhraseScore, for_each_picture, largest_size
from ...patching.maps import Maps

__all__ = ["LearnedPresence", "PresenceNetwork", "object_features"]


class PresenceNetwork(nn.Module):
    """(n, 2 L, height, width) of `object_features`, of L layers, to (n,) logits of "this object is there"."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2 * layers, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(48, 64, 3, padding=1), nn.GELU(),
        )  # fmt: skip
        self.out = nn.Linear(128, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.body((features.float().clamp(min=0) + 1e-4).log() / 3 + 1.5)
        return self.out(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))[:, 0]

    @classmethod
    def load(cls, path: Path) -> PresenceNetwork:
        """From a file of `safetensors`. Raises: OSError where it is missing."""
        from safetensors.torch import load_file

        weights = load_file(path)
        network = cls(weights["body.0.weight"].shape[1] // 2)
        network.load_state_dict(weights)
        return network.requires_grad_(False).eval()


class LearnedPresence(PhraseScore):
    """A score: the mean over a picture's phrases of the logarithm of the probability that each is there.

    phrases: as in `Presence`; a picture without any has 0. network: trained on maps of the layers that are captured.

    Example:
        >>> with sdattn_fast.apply(pipe, capture=Capture(layers="*")) as patch:
        ...     correction = Correction(patch, LearnedPresence(find_phrases(prompt, pipe.tokenizer), network))
    """

    needs_prediction = False

    def __init__(self, phrases: Sequence[Any], network: nn.Module) -> None:
        super().__init__(phrases)
        self.network = network

    def by_picture(self, seen: Seen) -> Tensor:
        """(B,), <= 0. Raises: as `Presence`."""
        of_pictures = object_features(seen.maps, self.phrases)
        return torch.stack(
            [
                F.logsigmoid(self.network(features)).mean() if len(features) else features.new_zeros(())
                for features in of_pictures
            ]
        )


def object_features(maps: Maps, phrases: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
    """Of each picture (objects, 2 L, height, width), at the largest layer's size: each object's map in every one of the
    L layers, and there the largest of the other objects' maps, zeros where there is no other.

    Raises: as `Presence`.
    """
    size = largest_size(maps, [i for some in phrases for tokens in some for i in tokens], "phrases")
    layers = torch.stack([F.interpolate(x.float(), size, mode="bilinear") for x in maps.values()], 1)
    place = {token: i for i, token in enumerate(maps.tokens)}
    found = []
    for x, some in zip(layers, for_each_picture(phrases, len(layers), "phrases"), strict=True):
        if not some:
            found.append(x.new_zeros(0, 2 * len(x), *size))
            continue
        own = torch.stack([x[:, [place[i] for i in tokens]].mean(1) for tokens in some])
        none = torch.zeros_like(own[:1])
        others = torch.stack([torch.cat([none, own[:k], own[k + 1 :]]).amax(0) for k in range(len(own))])
        found.append(torch.cat([own, others], 1))
    return found
