"""What pipelines do to a prompt before they tokenise it: PixArt's, Sana's and Latte's write it in lower case and, asked
to, clean it as a caption; Wan's and Kandinsky 5's replace HTML entities, curly quotes and white space."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
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
        if hasattr(self.kind, "_text_preprocessing"):
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
    if hasattr(kind, "_text_preprocessing"):
        if clean_caption is None:
            default = inspect.signature(kind.__call__).parameters.get("clean_caption")
            clean_caption = default is not None and bool(default.default)
    elif _prompt_clean(kind) is None:
        return tokenizer
    return CleaningTokenizer(tokenizer, kind, bool(clean_caption))


def aligned(prompt: str, cleaned: str) -> list[tuple[int, int]]:
    """Of each character of a cleaned prompt, where it comes from in the prompt, start to end. White space, and what
    cannot be told, comes from nowhere: its start and end are one place between words."""
    theirs, ours = ([m for m in _ITEMS.finditer(text)] for text in (prompt, cleaned))
    spans: list[tuple[int, int] | None] = [None] * len(cleaned)
    before, after = ([m[0].lower() for m in text] for text in (theirs, ours))
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for _, a, b, c, d in matcher.get_opcodes():
        if b - a != d - c:
            continue
        for of, one in zip(theirs[a:b], ours[c:d], strict=True):
            alike = len(of[0]) == len(one[0])
            for i in range(len(one[0])):
                start = of.start() + i
                spans[one.start() + i] = (start, start + 1) if alike else of.span()
    place, found = len(prompt), []
    for span in reversed(spans):
        found.append((place, place) if span is None else span)
        place = found[-1][0]
    return found[::-1]


def _prompt_clean(kind: type) -> Any:
    """The function of that name beside a pipeline's class or one that it derives from."""
    modules = (sys.modules.get(base.__module__) for base in kind.__mro__)
    return next((clean for one in modules if callable(clean := getattr(one, "prompt_clean", None))), None)
