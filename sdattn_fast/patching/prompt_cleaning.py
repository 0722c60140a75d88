"""What pipelines do to a prompt before they tokenise it: PixArt's, Sana's and Latte's write it in lower case and, asked
to, clean it as a caption; Wan's and Kandinsky 5's replace HTML entities, curly quotes and white space."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CleaningTokenizer", "aligned", "cleaning"]

# Words with their combining marks, for lower case has some, and every other character by itself.
_ITEMS = re.compile(r"[\w\u0300-\u036f]+|[^\w\s]")


@dataclass(frozen=True)
class CleaningTokenizer:
    """A pipeline's tokenizer, of prompts that its pipeline cleans first.

    plain: the tokenizer. kind: the pipeline's class. clean_caption: as in its call, which passes it on.
    """

    plain: Any
    kind: type
    clean_caption: bool

    def clean(self, prompt: str) -> str:
        """The prompt as it is tokenised."""
        if _writes_lower_case(self.kind):
            # It reads constants of the class alone, and a pipeline that is kept here would keep its models alive.
            bare: Any = object.__new__(self.kind)
            cleaned = bare._text_preprocessing(prompt, clean_caption=self.clean_caption)[0]
        else:
            cleaned = _prompt_clean(self.kind)(prompt)
        assert isinstance(cleaned, str)
        return cleaned

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        return self.plain(self.clean(text) if isinstance(text, str) else list(map(self.clean, text)), **options)

    def __len__(self) -> int:
        return len(self.plain)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask an object that has nothing yet
            raise AttributeError(name)
        return getattr(self.plain, name)


def cleaning(tokenizer: Any, pipe: Any, clean_caption: bool | None = None) -> Any:
    """The tokenizer, or one that cleans prompts where the pipeline does. clean_caption: None: as its call has it."""
    kind = type(pipe)
    if _writes_lower_case(kind):
        if clean_caption is None:
            default = inspect.signature(kind.__call__).parameters.get("clean_caption")
            clean_caption = default is not None and bool(default.default)
    elif _prompt_clean(kind) is None:
        return tokenizer
    return CleaningTokenizer(tokenizer, kind, bool(clean_caption))


def aligned(prompt: str, cleaned: str) -> list[tuple[int, int]]:
    """Of each character of a cleaned prompt, where it comes from in the prompt, start to end. White space, and what
    cannot be told, comes from nowhere: its start and end are one place between words."""
    spans: list[tuple[int, int] | None] = [None] * len(cleaned)
    theirs, ours = (list(re.finditer(r"\S+", text)) for text in (prompt, cleaned))
    for a, b, c, d in _runs(theirs, ours):
        if b - a == d - c:
            for word, one in zip(theirs[a:b], ours[c:d], strict=True):
                _by_items(spans, [word], [one], word.span())
        else:
            _by_items(spans, theirs[a:b], ours[c:d], None)
    place, found = len(prompt), []
    for span in reversed(spans):
        found.append((place, place) if span is None else span)
        place = found[-1][0]
    return found[::-1]


def _by_items(
    spans: list[tuple[int, int] | None],
    theirs: Sequence[re.Match[str]],
    ours: Sequence[re.Match[str]],
    whole: tuple[int, int] | None,
) -> None:
    """Fill in where the characters of our words come from in theirs; whole: what cannot be told comes from there."""
    items, cleaned = (
        [i for word in words for i in _ITEMS.finditer(word.string, *word.span())] for words in (theirs, ours)
    )
    for a, b, c, d in _runs(items, cleaned):
        for k in range(c, d):
            source = items[a + k - c].span() if b - a == d - c else whole
            if source is None:
                continue
            start, end = cleaned[k].span()
            alike = source[1] - source[0] == end - start
            for i in range(start, end):
                at = source[0] + i - start
                spans[i] = (at, at + 1) if alike else source


def _runs(theirs: Sequence[re.Match[str]], ours: Sequence[re.Match[str]]) -> list[tuple[int, int, int, int]]:
    """What of theirs stands for what of ours: first to last of each."""
    before, after = ([m[0].lower() for m in text] for text in (theirs, ours))
    return [found[1:] for found in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()]


def _of_diffusers(kind: type) -> list[type]:
    """A pipeline's class and those it derives from, as far as they are diffusers' own."""
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "diffusers"]


def _writes_lower_case(kind: type) -> bool:
    return any("_text_preprocessing" in vars(base) for base in _of_diffusers(kind))


def _prompt_clean(kind: type) -> Any:
    """The function of that name beside a pipeline's class or one that it derives from."""
    modules = (sys.modules.get(base.__module__) for base in _of_diffusers(kind))
    return next((clean for one in modules if callable(clean := getattr(one, "prompt_clean", None))), None)
