"""What scores of tokens have in common: the maps of a prediction that they need, and a score of each picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from .relevance import Seen

__all__ = ["TokenScore", "for_each_picture", "maps_of_tokens"]

Some = TypeVar("Some")


class TokenScore(ABC):
    """A score of word maps that has a number for each picture."""

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


def maps_of_tokens(seen: Seen, tokens: Sequence[int], argument: str) -> tuple[Tensor, dict[int, int]]:
    """(B, T, height, width), the mean over layers at the largest one's size; token -> its index among the T.

    Raises: ValueError where a token was not captured.
    """
    place = {token: i for i, token in enumerate(seen.maps.tokens)}
    if not len(seen.maps) or any(token not in place for token in tokens):
        raise ValueError(
            f"{argument}: expected maps of tokens {tuple(tokens)}, got those of {seen.maps.tokens}; "
            "apply(..., capture=Capture(tokens=...)) keeps them"
        )
    size = max(((x.shape[-2], x.shape[-1]) for x in seen.maps.values()), key=lambda s: s[0] * s[1])
    return seen.maps.upsample(size), place


def for_each_picture(given: Sequence[Some], pictures: int, argument: str) -> Sequence[Some]:
    """One of each picture's own; a single one is all pictures'."""
    given = list(given) * pictures if len(given) == 1 else given
    if len(given) != pictures:
        raise ValueError(f"{argument}: expected a list for each of {pictures} entries, got {len(given)}")
    return given
