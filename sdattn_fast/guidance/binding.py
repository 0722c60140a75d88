"""Binding of modifiers to their nouns, as a score of word maps.

Source: Rassin et al. 2023, "Linguistic Binding in Diffusion Models: Enhancing Attribute Correspondence through
Attention Map Alignment" (SynGen), section 3, arXiv 2306.08877.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..patching.words import words_of
from ..streams import to_device
from .phrases import NounPhrase
from .relevance import Seen
from .token_maps import LEAST, TokenScore, for_each_picture, maps_of_tokens, word_distributions

__all__ = ["Binding", "BindingPair", "binding_loss", "syntactic_pairs"]

Tokens = Sequence[int]


@dataclass(frozen=True)
class BindingPair:
    """A modifier and its noun, with the words that neither belongs to. `syntactic_pairs` makes them.

    Attributes:
        modifier: Token indices of the modifier.
        noun: Token indices of its noun.
        outside: Token indices of each word that is neither the noun nor one of its modifiers.

    Examples:
        >>> pair = BindingPair(modifier=(2,), noun=(3,), outside=((6,), (7,)))  # "a red car and a blue bench"
    """

    modifier: Tokens
    noun: Tokens
    outside: Sequence[Tokens]


class Binding(TokenScore):
    """A score: how alike the maps of modifiers and their nouns are, and how unlike those of other words.

    It is minus `binding_loss`, the mean over the B pictures. Maps are the mean over captured layers (at the largest
    one's size) and heads. The patch needs a `capture` that keeps the pairs' tokens.

    Args:
        pairs: Pairs of `syntactic_pairs`; for several prompts, a list of such lists, of which some may be empty: these
            pictures' score is 0.

    Raises:
        TypeError: If a pair is not a `BindingPair`.
        ValueError: If there is no pair.

    Examples:
        >>> phrases = find_phrases(prompt, pipe.tokenizer)
        >>> binding = Binding(syntactic_pairs(pipe.tokenizer, prompt, phrases))
        >>> with sdattn_fast.apply(pipe, capture=Capture()) as patch, Correction(patch, binding) as correct:
        ...     image = pipe(prompt, callback_on_step_end=correct).images[0]

    Source: SynGen, Rassin et al. 2023, arXiv 2306.08877.
    """

    needs_prediction = False

    def __init__(self, pairs: Sequence[BindingPair] | Sequence[Sequence[BindingPair]]) -> None:
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):
            raise TypeError(f"pairs: expected a sequence of BindingPair, got {pairs!r:.80}")
        by_picture = bool(pairs) and all(isinstance(some, Sequence) for some in pairs)
        self.pairs: list[list[BindingPair]] = [list(some) for some in (pairs if by_picture else [pairs])]  # type: ignore[arg-type]
        for pair in (pair for some in self.pairs for pair in some):
            if not isinstance(pair, BindingPair):
                raise TypeError(f"pairs: expected BindingPair, got {pair!r}")
        if not any(self.pairs):
            raise ValueError(f"pairs: expected at least one, got {pairs!r}")

    @property
    def tokens(self) -> tuple[int, ...]:
        """The indices of all tokens of all pairs."""
        of_pairs = (
            token
            for some in self.pairs
            for pair in some
            for word in (pair.modifier, pair.noun, *pair.outside)
            for token in word
        )
        return tuple(sorted(set(of_pairs)))

    def by_picture(self, seen: Seen) -> Tensor:
        """The score of each picture.

        Args:
            seen: The prediction and its maps.

        Returns:
            A (B,) tensor.

        Raises:
            ValueError: If maps of these tokens are missing, or there are not as many lists as pictures.
        """
        maps, place = maps_of_tokens(seen, self.tokens, "pairs")
        pairs = for_each_picture(self.pairs, len(maps), "pairs")
        maps = maps.clamp_min(LEAST).movedim(1, -1)
        losses = [
            binding_loss(x, _renumbered(some, place)) if some else x.new_zeros(())
            for x, some in zip(maps, pairs, strict=True)
        ]
        return -torch.stack(losses)


def binding_loss(maps: Tensor, pairs: Sequence[BindingPair]) -> Tensor:
    """The loss of SynGen: the sum over pairs of d(m, n) - mean of (d(m, u) + d(u, n)) / 2 over words u outside.

    d is the symmetric Kullback-Leibler divergence, (KL(a || b) + KL(b || a)) / 2, of maps that are scaled to sum to 1.
    A word of several tokens has their mean map.

    Args:
        maps: (height, width, tokens) floating tensor, >= 0.
        pairs: The pairs, whose tokens index the maps' last dimension.

    Returns:
        A scalar tensor of the maps' dtype.

    Examples:
        >>> loss = binding_loss(torch.rand(16, 16, 77), syntactic_pairs(tokenizer, prompt, phrases))

    Source: Rassin et al. 2023, section 3, arXiv 2306.08877.
    """
    words = list(dict.fromkeys(tuple(w) for pair in pairs for w in (pair.modifier, pair.noun, *pair.outside)))
    index = {tokens: i for i, tokens in enumerate(words)}
    # Row i, column j: how often the loss has the distance of the words i and j.
    weights = torch.zeros((len(words), len(words)), dtype=torch.promote_types(maps.dtype, torch.float32))
    for pair in pairs:
        modifier, noun = index[tuple(pair.modifier)], index[tuple(pair.noun)]
        weights[modifier, noun] += 1
        for other in pair.outside:
            weights[modifier, index[tuple(other)]] -= 0.5 / len(pair.outside)
            weights[index[tuple(other)], noun] -= 0.5 / len(pair.outside)
    distances = _distances(word_distributions(maps, words))
    return (to_device(weights, maps.device) * distances).sum().to(maps.dtype)


def syntactic_pairs(tokenizer: Any, prompt: str, phrases: Sequence[NounPhrase]) -> list[BindingPair]:
    """Each noun of a prompt with each of its adjectives, participles and nouns.

    Articles and numbers are no modifiers. SynGen takes modifiers from a dependency parser, which also finds "the car is
    red"; here they are those inside noun phrases.

    Args:
        tokenizer: The pipeline's.
        prompt: The text.
        phrases: Its noun phrases, from `find_phrases`.

    Returns:
        The pairs; none for a prompt without modifiers.

    Examples:
        >>> pairs = syntactic_pairs(pipe.tokenizer, prompt, find_phrases(prompt, pipe.tokenizer))
    """
    words = list(words_of(tokenizer, prompt).values())
    pairs = []
    for phrase in phrases:
        inside = set(phrase.tokens("adjective-noun"))
        outside = [tokens for tokens in words if not inside & set(tokens)]
        modifiers = [w.tokens for w in phrase.words if w is not phrase.head and w.tokens and inside >= set(w.tokens)]
        pairs += [BindingPair(modifier, phrase.head.tokens, outside) for modifier in modifiers]
    return pairs


def _renumbered(pairs: Sequence[BindingPair], place: dict[int, int]) -> list[BindingPair]:
    def of(tokens: Tokens) -> tuple[int, ...]:
        return tuple(place[token] for token in tokens)

    return [BindingPair(of(one.modifier), of(one.noun), [of(word) for word in one.outside]) for one in pairs]


def _distances(maps: Tensor) -> Tensor:
    """(KL(a || b) + KL(b || a)) / 2 = sum (a - b) (log a - log b) / 2 of every two rows, in one product."""
    cross = maps @ maps.log().T
    own = cross.diagonal()
    return (own[:, None] + own[None, :] - cross - cross.T) / 2
