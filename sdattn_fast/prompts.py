"""Files of prompts: a line a prompt, as plain text or as JSON with the words that name its objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import parse_json

__all__ = ["Prompt", "read_prompts", "report_truncation", "words_to_find"]

# Closed classes of words, which name nothing that could be seen.
_NAMELESS = frozenset(
    "a an the this that these those some any each every no and or but nor of in on at to from by with without into "
    "onto over under above below behind beside between near next left right front back top bottom is are was were be "
    "being it its his her their my your our he she they we you i as than very while who which what where there".split()
)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the words that name its objects where the file says them. geneval: its "include", "exclude" and
    "tag", those of them that there are."""

    text: str
    words: tuple[str, ...] | None = None
    geneval: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(path: Path, name: str = "prompts") -> list[Prompt]:
    """The prompts of a file; empty lines are passed over.

    A line is a prompt, or ``{"prompt": "a red car", "words": ["car"]}``, or one of GenEval's
    `evaluation_metadata.jsonl`.

    Raises: OSError; ValueError, naming the line, where one is not such; also for a file without prompts.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected text in UTF-8 in {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line.startswith("{"):
            prompts.append(_from_json(line, f"{name}: {path}, line {number}"))
        elif line:
            prompts.append(Prompt(line))
    if not prompts:
        raise ValueError(f"{name}: expected at least one prompt in {path}, got none")
    return prompts


@contextlib.contextmanager
def report_truncation(tokenizer: Any, prompts: Sequence[str], console: Any) -> Iterator[None]:
    """Tells rich's console which prompts are longer than the model reads, and keeps diffusers from telling it at every
    call, with the padding of all the prompts beside them."""
    from .loading import quiet_loading

    most = int(tokenizer.model_max_length)
    with quiet_loading():
        for prompt in dict.fromkeys(prompts):
            tokens = len(tokenizer(prompt).input_ids)
            if tokens > most:
                console.print(
                    f"the model reads {most} tokens, and {prompt[:40]!r}... has {tokens}: what is beyond is not drawn",
                    markup=False,  # a prompt may have brackets
                )
        yield


def words_to_find(prompt: Prompt, words: list[str]) -> list[str]:
    """Of all words of a prompt, those its file asks for, or else those that may name something."""
    if prompt.words is not None:
        return list(prompt.words)
    plain = [(word, word.partition(" (")[0].lower()) for word in words]
    # An emoji names something, and has no letter.
    return [word for word, name in plain if name not in _NAMELESS and any(c.isalpha() or c > "\x7f" for c in name)]


def _from_json(line: str, location: str) -> Prompt:
    content = parse_json(line, f'{location}: expected a prompt, or {{"prompt": ..., "words": [...]}}')
    text, words = content.get("prompt"), content.get("words")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{location}: expected "prompt" to be some words, got {text!r}')
    if words is not None and (not isinstance(words, list) or any(not isinstance(word, str) for word in words)):
        raise ValueError(f'{location}: expected "words" to be a list of words, got {words!r}')
    for name in ("include", "exclude"):
        if not isinstance(content.get(name, []), list):
            raise ValueError(f'{location}: expected "{name}" to be a list of GenEval\'s entries, got {content[name]!r}')
    geneval = {name: content[name] for name in ("include", "exclude", "tag") if name in content}
    return Prompt(text.strip(), None if words is None else tuple(words), geneval)
