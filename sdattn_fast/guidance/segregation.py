"""Segregation of objects, as a score of their maps: each is to be attended to where the others are not.

Source: Agarwal et al. 2023, "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis",
section 3.2, arXiv 2306.14544.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .relevance import Seen
from .token_maps import PhraseScore

__all__ = ["Segregation"]


class Segregation(PhraseScore):
    """A score: 1 minus the overlap of the phrases' maps, the mean over the pairs of a picture's phrases.

    A phrase's map is the mean over its tokens, the captured layers (at the largest one's size) and the heads, scaled to
    sum to 1; the overlap of two is the sum over pixels of the smaller one. A-STAR divides it by the sum of both maps,
    which is 2 for maps that are scaled. The score is the mean over the B pictures. The patch needs a `capture` that
    keeps these tokens.

    Args:
        phrases: Token indices of each phrase, or what `find_phrases` gives, whose nouns count; for several prompts, a
            list of such lists, of which some may have fewer than two phrases: these pictures' score is 1.

    Raises:
        TypeError: If `phrases` are others.
        ValueError: If there is no phrase, or one without tokens.

    Examples:
        >>> apart = Segregation(find_phrases(prompt, pipe.tokenizer))
        >>> with sdattn_fast.apply(pipe, capture=Capture()) as patch, Correction(patch, apart) as correct:
        ...     image = pipe(prompt, callback_on_step_end=correct).images[0]

    Source: A-STAR, Agarwal et al. 2023, section 3.2, arXiv 2306.14544.
    """

    needs_prediction = False

    def by_picture(self, seen: Seen) -> Tensor:
        """The score of each picture.

        Args:
            seen: The prediction and its maps.

        Returns:
            A (B,) tensor in [0, 1].

        Raises:
            ValueError: If maps of these tokens are missing, or there are not as many lists as pictures.
        """
        return torch.stack([_apart(x) if len(x) > 1 else x.new_ones(()) for x in self.distributions(seen)])


def _apart(distributions: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(distributions), len(distributions), 1, device=distributions.device)
    overlaps = torch.minimum(distributions[first], distributions[second]).sum(1)
    return 1 - overlaps.mean()
