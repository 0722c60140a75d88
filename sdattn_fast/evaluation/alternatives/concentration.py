"""Concentration of objects' maps, as a score: each object is to be attended to in one place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...guidance.relevance import Seen
from ...guidance.token_maps import PhraseScore

__all__ = ["Concentration"]


class Concentration(PhraseScore):
    """A score: 1 minus the entropy of each phrase's map over pixels, as a share of the most there can be; the mean over
    the phrases. phrases: as in `Presence`. A picture without any has 1.

    Example:
        >>> correction = Correction(patch, Concentration(find_phrases(prompt, pipe.tokenizer)))
    """

    needs_prediction = False

    def by_picture(self, seen: Seen) -> Tensor:
        """(B,), from 0, where every map is uniform, to 1, where each is one pixel. Raises: as `Presence`."""
        return torch.stack([_concentration(x) if len(x) else x.new_ones(()) for x in self.distributions(seen)])


def _concentration(distributions: Tensor) -> Tensor:
    entropies = -torch.special.xlogy(distributions, distributions).sum(1)
    return 1 - entropies.mean() / math.log(distributions.shape[1])
