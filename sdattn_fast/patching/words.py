"""A prompt's words and the tokens of each, as the prompt writes them."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from .prompt_cleaning import cleaning
from .text_tokens import covering, text_tokens

__all__ = ["ByWord", "tokenizer_of", "words_of"]

T = TypeVar("T")


class ByWord(Mapping[str, T]):
    """Word -> what belongs to it, in the prompt's order.

    Words are named as the prompt writes them and looked up in upper or lower case, for CLIP reads lower case. A word
    that is not there is a KeyError that names those that are.
    """

    def __init__(self, by_word: Mapping[str, T]) -> None:
        self._by_word = dict(by_word)
        self._names: dict[str, str] = {}
        for word in self._by_word:
            self._names.setdefault(_as_read(word), word)

    def __getitem__(self, word: str) -> T:
        if word in self._by_word:
            return self._by_word[word]
        name = self._names.get(_as_read(word)) if isinstance(word, str) else None
        if name is None:
            raise KeyError(f"word: expected one of {', '.join(map(repr, self)) or 'no words'}, got {word!r}")
        return self._by_word[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_word)

    def __len__(self) -> int:
        return len(self._by_word)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._by_word})"


def words_of(tokenizer: Any, prompt: str, tokens: int | None = None) -> ByWord[list[int]]:
    """The prompt's words -> their token indices.

    A word is what stands between white space, without punctuation at its ends: "t-shirt" and "don't" are one word, a
    comma is none. A token that was added to the vocabulary, as textual inversions are, is a word with all its vectors.
    A word that comes again, in upper or lower case, is called "word (2)". Left out are words without a token: those
    that the text has no room for, and those that the tokenizer does not know.

    Args:
        tokenizer, prompt, tokens: as in `text_tokens`; tokens: how many the text has, None: the tokenizer's length.

    Example: ``words_of(pipe.tokenizer, "A red <thing>, a car")["car"]``.

    Raises: TypeError, ValueError, as `text_tokens`.
    """
    found = text_tokens(tokenizer, prompt, tokens)
    words: dict[str, list[int]] = {}
    read: set[str] = set()
    for start, end in _spans(prompt, sorted({(t.start, t.end) for t in found if t.added})):
        indices = [t.index for t in covering(found, start, end) if t.known]
        if not indices:
            continue
        name, again = prompt[start:end], 2
        while _as_read(name) in read:
            name, again = f"{prompt[start:end]} ({again})", again + 1
        read.add(_as_read(name))
        words[name] = indices
    return ByWord(words)


def tokenizer_of(pipe: Any, clean_caption: bool | None = None) -> Any:
    """A pipeline's tokenizer, or its tokenizer_2, the only one of an SDXL refiner; None where it has neither. It cleans
    prompts where the pipeline does; clean_caption: as the pipeline was called with, None: as it is by default."""
    first = getattr(pipe, "tokenizer", None)
    tokenizer = getattr(pipe, "tokenizer_2", None) if first is None else first
    return None if tokenizer is None else cleaning(tokenizer, pipe, clean_caption)


def _spans(prompt: str, added: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Of each word its characters, start to end; added: those of added tokens, which are words whatever is in them."""
    at = 0
    for start, end in [*added, (len(prompt), len(prompt))]:
        for found in re.compile(r"\S+").finditer(prompt, at, start):
            first, last = found.span()
            while first < last and _is_mark(prompt[first]):
                first += 1
            while first < last and _is_mark(prompt[last - 1]):
                last -= 1
            if first < last:
                yield first, last
        if start < end:
            yield start, end
        at = end


def _is_mark(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _as_read(word: str) -> str:
    """As CLIP reads it; NFC makes one character of a letter and its accent."""
    return unicodedata.normalize("NFC", word).lower()
