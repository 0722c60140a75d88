"""Which characters of a prompt each token of its text was made of, and where the token lies in that text.

Vectors of a textual inversion are written out as `TextualInversionLoaderMixin.maybe_convert_prompt` of diffusers does
before a pipeline tokenises. Fast tokenizers say which characters a token has. Slow ones, such as transformers 4's
CLIPTokenizer, do not: the bytes that their tokens spell must be those of the prompt, as the tokenizer cleans it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .prompt_cleaning import CleaningTokenizer, aligned

__all__ = ["TextToken", "covering", "text_tokens"]

Span = tuple[int, int]


@dataclass(frozen=True)
class TextToken:
    """A token that a prompt's text has between BOS and EOS.

    index: in the text. start, end: the characters of the prompt that it was made of; all vectors of a textual inversion
    have those of its name. added: to the vocabulary, as textual inversions are. known: False for the token of what the
    vocabulary does not have, and for BOS and EOS that the prompt itself writes.
    """

    index: int
    start: int
    end: int
    added: bool
    known: bool


def text_tokens(tokenizer: Any, prompt: str, tokens: int | None = None) -> list[TextToken]:
    """The prompt's tokens in the order of the text; those that the text has no room for are left out.

    Args:
        tokenizer: of the text encoder, CLIP's or another of transformers; a slow one must be CLIP's.
        prompt: the text as it is tokenised: without the weights that compel and lpw take out.
        tokens: how many tokens the text has, BOS, EOS and padding among them. None: the tokenizer's length, 77 for
            CLIP's, where pipelines of diffusers cut. A multiple of it, such as 154 or 231: chunks of 75 with a BOS and
            an EOS each, as compel and lpw make them. 75 or a multiple more, such as 152 or 227: one BOS and one EOS
            around all, which lpw makes with ``no_boseos_middle=True``.

    Example: ``[t.index for t in text_tokens(pipe.tokenizer, "a red car")]`` is [1, 2, 3].

    Raises:
        TypeError: tokens that are no int. ValueError: tokens that make none of these; a tokenizer whose tokens cannot
            be told apart in the prompt, or that pads on the left.
    """
    if getattr(tokenizer, "padding_side", "right") == "left":
        # Pipelines such as Sana's change it when they encode: where words will lie is not known before.
        raise ValueError(
            f"tokenizer: expected one that pads on the right, and {type(tokenizer).__name__} pads on the left, so that "
            "where words lie depends on the prompt's length; set padding_side = 'right' where the pipeline does"
        )
    cleaned = prompt
    if isinstance(tokenizer, CleaningTokenizer):
        cleaned, tokenizer = tokenizer.clean(prompt), tokenizer.plain
    text, origin = _with_vectors(tokenizer, cleaned)
    if cleaned != prompt:
        source = aligned(prompt, cleaned)
        origin = [(source[a][0], source[b - 1][1]) for a, b in origin]
    spans: Iterable[Span]
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = list(encoded.input_ids), encoded.offset_mapping
    else:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        spans = _spans_by_bytes(tokenizer, text, ids)
    places = _places(tokenizer, text, ids, tokens)
    own = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    added = set(tokenizer.added_tokens_encoder.values()) - own - {getattr(tokenizer, "pad_token_id", None)}
    found = []
    for token, (a, b), place in zip(ids, spans, places, strict=False):
        start, end = (origin[a][0], origin[b - 1][1]) if a < b else (0, 0)
        found.append(TextToken(place, start, end, token in added, token not in own))
    return found


def covering(tokens: Iterable[TextToken], start: int, end: int) -> list[TextToken]:
    """Those with at least one of the prompt's characters from start to end."""
    return [t for t in tokens if t.start < end and start < t.end]


def _with_vectors(tokenizer: Any, prompt: str) -> tuple[str, list[Span]]:
    """The text as `maybe_convert_prompt` writes it, and of each of its characters, where it comes from in the prompt.

    It replaces text and not tokens: a name inside another one is replaced there too.
    """
    text, origin = prompt, [(i, i + 1) for i in range(len(prompt))]
    added = tokenizer.added_tokens_encoder
    if not any(f"{name}_1" in added for name in added):
        return text, origin
    for name in dict.fromkeys(_pieces(tokenizer, prompt)):
        vectors = [name]
        while name in added and f"{name}_{len(vectors)}" in added:
            vectors.append(f"{name}_{len(vectors)}")
        if len(vectors) == 1:
            continue
        written = " ".join(vectors)
        at = text.find(name)
        while at >= 0:
            end = at + len(name)
            origin[at:end] = [(origin[at][0], origin[end - 1][1])] * len(written)
            text = text[:at] + written + text[end:]
            at = text.find(name, at + len(written))
    return text, origin


def _pieces(tokenizer: Any, text: str) -> list[str]:
    """`tokenizer.tokenize`, which would warn of long texts."""
    if getattr(tokenizer, "is_fast", False):
        return list(tokenizer(text, add_special_tokens=False, verbose=False).tokens())
    return list(tokenizer.tokenize(text))


def _places(tokenizer: Any, text: str, ids: Sequence[int], tokens: int | None) -> list[int]:
    """Where in the text the tokens lie that it has room for."""
    ends, whole = (list(tokenizer(x, verbose=False).input_ids) for x in ("", text))
    before = next((i for i in range(len(ends) + 1) if whole == [*ends[:i], *ids, *ends[i:]]), None)
    if before is None:
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} has other tokens inside BOS and EOS than without them")
    length = int(tokenizer.model_max_length)
    chunk = _chunk(length if tokens is None else tokens, length, len(ends))
    room = max(chunk - len(ends), 1)
    last = length if tokens is None else tokens
    places = (i // room * chunk + before + i % room for i in range(len(ids)))
    return [place for place in places if place < last - (len(ends) - before)]


def _chunk(tokens: int, length: int, ends: int) -> int:
    """How many tokens each chunk has, its BOS and EOS among them."""
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens: expected an int or None, got {type(tokens).__name__}")
    if 1 <= tokens <= length or (tokens > length and (tokens - ends) % (length - ends) == 0):
        return tokens
    if tokens > length and tokens % length == 0:
        return length
    raise ValueError(
        f"tokens: expected 1 to {length}, chunks of {length} such as {2 * length}, or {2 * length - ends} with one BOS "
        f"and EOS, got {tokens}"
    )


def _spans_by_bytes(tokenizer: Any, text: str, ids: Sequence[int]) -> list[Span]:
    """Of each token its characters, where the tokenizer does not say them."""
    name = type(tokenizer).__name__
    pieces, added = list(tokenizer.tokenize(text)), tokenizer.added_tokens_encoder
    spelled = [piece.encode() if piece in added else _bytes_of(piece) for piece in pieces]
    written = _written(text, added, lambda part: _cleaned(tokenizer, part))
    said, wanted = b"".join(filter(None, spelled)), b"".join(part for part, _ in written)
    # In lower case a sigma at a word's end is another letter, of as many bytes.
    same = said.replace("ς".encode(), "σ".encode()) == wanted.replace("ς".encode(), "σ".encode())
    if None in spelled or not same or tokenizer.convert_tokens_to_ids(pieces) != ids:
        raise ValueError(f"tokenizer: the tokens of {name} do not spell the prompt {text!r}; use its fast version")
    of_bytes = [span for part, span in written for _ in part]
    spans, at = [], 0
    for part in filter(None, spelled):
        mine = of_bytes[at : at + len(part)]
        at += len(part)
        spans.append((mine[0][0], mine[-1][1]))
    return spans


def _written(text: str, added: Iterable[str], cleaned: Callable[[str], bytes]) -> list[tuple[bytes, Span]]:
    """The text cut into characters, with the marks that combine with them, and added tokens, which stay as they are."""
    names = "|".join(re.escape(name) for name in sorted(added, key=len, reverse=True))
    parts: list[tuple[bytes, Span]] = []
    at = 0
    for found in re.finditer(names, text) if names else ():
        parts += _characters(text, at, found.start(), cleaned)
        parts.append((found[0].encode(), found.span()))
        at = found.end()
    return parts + _characters(text, at, len(text), cleaned)


def _characters(text: str, at: int, end: int, cleaned: Callable[[str], bytes]) -> list[tuple[bytes, Span]]:
    parts = []
    while at < end:
        after = at + 1
        while after < end and unicodedata.category(text[after]).startswith("M"):
            after += 1
        parts.append((cleaned(text[at:after]), (at, after)))
        at = after
    return parts


def _cleaned(tokenizer: Any, part: str) -> bytes:
    """What the tokens of a part of the text spell: lower case, no white space; with ftfy where the tokenizer has it."""
    fix, basic = getattr(tokenizer, "fix_text", None), getattr(tokenizer, "nlp", None)
    if fix is not None:
        part = fix(part).lower()
    elif basic is not None:
        part = "".join(basic.tokenize(part))
    else:
        part = unicodedata.normalize("NFC", part).lower()
    return "".join(part.split()).encode()


def _bytes_of(piece: str) -> bytes | None:
    """Those that a piece of a byte-level vocabulary stands for; None: it is of another kind."""
    byte_of = _byte_level()
    found = [byte_of.get(c) for c in piece.removesuffix("</w>")]
    return None if not found or None in found else bytes(b for b in found if b is not None)


@cache
def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: bytes that print stand for themselves, and the others for the characters from 256 on."""
    prints = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(256) if b not in prints]
    return {**{chr(b): b for b in prints}, **{chr(256 + i): b for i, b in enumerate(others)}}
