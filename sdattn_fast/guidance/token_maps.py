"""What scores of tokens have in common: whose tokens they are of, the maps that they need, a score of each picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..patching.maps import Maps
from .phrases import NounPhrase
from .relevance import Seen

__all__ = [
    "LEAST", "PhraseScore", "TokenScore", "WeightedScore", "for_each_picture", "largest_size",
    "maps_of_tokens", "word_distributions",
]  # fmt: skip

Some = TypeVar("Some")
# Bicubic upsampling undershoots; below this a probability says nothing of where a word is.
LEAST = 1e-6


class TokenScore(ABC):
    """A score of word maps that has a number for each picture.

    needs_prediction: as `Seen` says. A subclass may read the prediction, unless it says for itself that it does not.
    """

    needs_prediction = True

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        cls.needs_prediction = cls.__dict__.get("needs_prediction", True)

    def __call__(self, seen: Seen) -> Tensor:
        """The score of a prediction.

        Args:
            seen: The prediction and its maps.

        Returns:
            A scalar tensor.

        Raises:
            ValueError: If maps of these tokens are missing, or there are not as many lists as pictures.
        """
        return self.by_picture(seen).mean()

    @abstractmethod
    def by_picture(self, seen: Seen) -> Tensor:
        """The score of each picture, (B,)."""


class PhraseScore(TokenScore):
    """A score of phrases. phrases: as in `Presence`. Raises: TypeError, ValueError for what are none."""

    def __init__(self, phrases: Sequence[Any]) -> None:
        nested = _nested_tokens(phrases)
        by_picture = any(some and not isinstance(some[0], int) for some in nested)
        self.phrases = [[tuple(phrase) for phrase in some] for some in (nested if by_picture else [nested])]
        if not any(self.phrases) or any(not phrase for some in self.phrases for phrase in some):
            raise ValueError(f"phrases: expected token indices of at least one phrase, got {phrases!r}")

    @property
    def tokens(self) -> tuple[int, ...]:
        """The indices of all tokens of all phrases."""
        return tuple(sorted({i for some in self.phrases for phrase in some for i in phrase}))

    def distributions(self, seen: Seen) -> list[Tensor]:
        """Of each picture (its phrases, pixels), each phrase's `word_distributions`. Raises: as `by_picture`."""
        maps, place = maps_of_tokens(seen, self.tokens, "phrases")
        phrases = for_each_picture(self.phrases, len(maps), "phrases")
        maps = maps.clamp_min(LEAST).movedim(1, -1)
        return [
            word_distributions(x, [[place[i] for i in phrase] for phrase in some])
            if some
            else x.new_zeros(0, x[..., 0].numel())
            for x, some in zip(maps, phrases, strict=True)
        ]


class WeightedScore(TokenScore):
    """The sum of scores, each times its weight. weighted: at least one; each gives a score of every picture."""

    def __init__(self, weighted: Sequence[tuple[float, TokenScore]]) -> None:
        self.weighted = weighted
        self.needs_prediction = any(score.needs_prediction for _, score in weighted)

    def by_picture(self, seen: Seen) -> Tensor:
        """The score of each picture, (B,)."""
        return torch.stack([weight * score.by_picture(seen) for weight, score in self.weighted]).sum(0)


def maps_of_tokens(seen: Seen, tokens: Sequence[int], argument: str) -> tuple[Tensor, dict[int, int]]:
    """(B, T, height, width) of these T tokens, the mean over layers at the largest one's size; token -> its index.

    Raises: ValueError where a token was not captured.
    """
    return seen.maps.upsample(largest_size(seen.maps, tokens, argument), tokens), {
        token: i for i, token in enumerate(tokens)
    }


def largest_size(maps: Maps, tokens: Sequence[int], argument: str) -> tuple[int, int]:
    """The (height, width) of the largest layer. Raises: ValueError where one of these tokens was not captured."""
    if not len(maps):
        raise ValueError(
            f"{argument}: expected maps of tokens {tuple(tokens)}, got none: no captured layer ran with the patch's "
            "processor in this forward"
        )
    if not set(tokens) <= set(maps.tokens):
        raise ValueError(
            f"{argument}: expected maps of tokens {tuple(tokens)}, got those of {maps.tokens}; "
            "apply(..., capture=Capture(tokens=...)) keeps them"
        )
    return max(((x.shape[-2], x.shape[-1]) for x in maps.values()), key=lambda s: s[0] * s[1])


def word_distributions(maps: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """(words, pixels), float32 or more: of each word, the mean of its tokens' maps, scaled to sum to 1.

    maps: (height, width, tokens), >= 0. words: indices into its last dimension.
    """
    shares = torch.stack([maps[..., list(tokens)].mean(-1).flatten() for tokens in words])
    shares = shares.clamp_min(torch.finfo(maps.dtype).tiny)  # where half precision has zeros, logarithms are finite
    shares = shares.to(torch.promote_types(maps.dtype, torch.float32))
    return shares / shares.sum(1, keepdim=True)


def for_each_picture(given: Sequence[Some], pictures: int, argument: str) -> Sequence[Some]:
    """One of each picture's own; a single one is all pictures'."""
    given = list(given) * pictures if len(given) == 1 else given
    if len(given) != pictures:
        raise ValueError(f"{argument}: expected a list for each of {pictures} entries, got {len(given)}")
    return given


def _nested_tokens(phrases: Any) -> list[Any]:
    """Lists of token indices, as deep as `phrases` are. Raises: TypeError, ValueError for what are no indices."""
    if isinstance(phrases, (str, Mapping)) or not isinstance(phrases, Iterable):
        raise TypeError(f"phrases: expected token indices of each phrase, or NounPhrases, got {phrases!r:.80}")
    nested: list[Any] = []
    for phrase in phrases:
        if isinstance(phrase, NounPhrase):
            nested.append(phrase.tokens("noun"))
        elif isinstance(phrase, int) and not isinstance(phrase, bool):
            if phrase < 0:
                raise ValueError(f"phrases: expected token indices >= 0, got {phrase}")
            nested.append(phrase)
        else:
            nested.append(_nested_tokens(phrase))
    return nested
