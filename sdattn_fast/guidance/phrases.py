"""The noun phrases of a prompt, and the tokens that each of them is made of.

A tagger says which words are nouns, adjectives, determiners; a chunk grammar puts them together; the tokenizer's
offsets say which pieces a word was cut into. TextBlob's pattern tagger and NLTK's chunker need no download. Prompt
weights such as "(red:1.2)", "(red)1.2" or "red++" are compel's: here their marks and numbers are words of no phrase.

Source: the phrase fusion of PnP-OVSS; Feng et al. 2023, "Structured Diffusion Guidance", section 3.2, for noun phrases
as the unit that binds.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..patching.text_tokens import covering, text_tokens
from ..patching.words import tokenizer_of

__all__ = ["NounPhrase", "Word", "find_phrases", "head_words", "phrase_ids"]

# Adjectives, participles and nouns before a noun; a lone adjective after a determiner stands for one ("the red").
_GRAMMAR = r"""
NP: {<DT|PRP\$>?<CD>*<JJ.*|VBN|VBG>*<NN.*>+}
    {<DT><CD>*<JJ.*>+}
"""
_WEIGHTS = re.compile(
    r":\s*-?\d+(?:\.\d+)?(?=\s*[)\]])"  # (red:1.2)
    r"|\.(?:and|blend)\s*\([^()]*\)|\.swap(?=\()"  # ("a car", "a bench").and(), a cat.swap(dog)
    r"|[)\]]\s?-?\d+(?:\.\d+)?|[()\[\]{}]"
    r"|(?<=[\w)\]])(?:\++|-+)(?!\w)"  # red++, (dark red)--
)
# Nouns that name no thing but a place beside one.
_PLACES = re.compile(
    r"\b(?:in|on|to|at|along|inside)\s+(?:the\s+)?(?:very\s+)?(?:front|top|bottom|side|left|right|back|rear|middle|"
    r"cent(?:er|re)|edge|corner|inside)(?:\s+side)?\s+of\b",
    re.IGNORECASE,
)
# Scripts that put no space between words: Thai, Lao, Khmer, Japanese and Chinese.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# Verbs or adjectives to the tagger wherever they stand; after a noun or an adjective ("polar bears") they are nouns.
_NOUNS = frozenset({"bear", "blossom", "cleaner", "drum", "net", "rose", "shed", "stick"})
_A_SINGULAR = frozenset({"a", "an", "one", "each", "every"})
_VERBS = ("VB", "VBP", "VBZ", "VBD")
_OF_A_NOUN = ("NN", "JJ", "VBN", "VBG")
# TextBlob reads its lexicon at the first call, and a call beside that one takes words not yet read for nouns.
_TAGGING = threading.Lock()


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Attributes:
        text: As in the prompt.
        tag: Its Penn Treebank tag.
        start: Index of its first character in the prompt.
        end: Index after its last character.
        tokens: Indices of its tokens.
    """

    text: str
    tag: str
    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class NounPhrase:
    """A noun phrase of a prompt, as `find_phrases` gives it.

    Attributes:
        text: As in the prompt, without prompt weights, with single spaces.
        words: Its words; the last one is the noun.
        start: Index of its first character in the prompt.
        end: Index after its last character.

    Examples:
        >>> car = find_phrases("a red car", pipe.tokenizer)[0]
        >>> car.head.text, car.tokens("noun"), car.tokens("adjective-noun")
        ('car', (3,), (2, 3))
    """

    text: str
    words: tuple[Word, ...]
    start: int
    end: int

    @property
    def head(self) -> Word:
        """The noun: the last word."""
        return self.words[-1]

    def tokens(self, which: str = "all") -> tuple[int, ...]:
        """Token indices of some of the words.

        Args:
            which: "all" words; "adjective-noun", without articles and numbers; or the "noun" alone.

        Returns:
            The indices, in the prompt's order.

        Raises:
            ValueError: If `which` is another string.
        """
        if which not in ("all", "adjective-noun", "noun"):
            raise ValueError(f"which: expected 'all', 'adjective-noun' or 'noun', got {which!r}")
        words = self.words if which == "all" else (self.head,)
        if which == "adjective-noun":
            words = tuple(w for w in self.words if w is self.head or w.tag.startswith(_OF_A_NOUN))
        return tuple(i for word in words for i in word.tokens)


def find_phrases(
    prompt: str,
    tokenizer: Any,
    *,
    phrases: Iterable[str] | None = None,
    parser: Any = None,
    tokens: int | None = None,
) -> list[NounPhrase]:
    """Find the noun phrases of an English prompt, with their tokens.

    Args:
        prompt: The text. Words that are cut off are left out, and so are phrases without their noun.
        tokenizer: The text encoder's: CLIP's or another one of transformers. Or the pipeline, whose own cleaning of
            prompts then counts too: PixArt's and Sana's write them in lower case.
        phrases: The phrases themselves, as they stand in the prompt, with weights or without; "car (2)" is the second
            car. Every word then counts as the noun's. None: a tagger finds them.
        parser: A loaded spaCy pipeline, whose noun chunks are taken. None: TextBlob's tagger and a grammar.
        tokens: How many tokens the text has, such as 154 in two chunks of 77. None: the tokenizer's length.

    Returns:
        The phrases in the prompt's order; none for an empty prompt or one without a noun.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the prompt does not have a phrase, or `tokens` fits no chunks.
        ImportError: If TextBlob or NLTK is missing.

    Examples:
        >>> [phrase.text for phrase in find_phrases("a red car and a blue bench", pipe.tokenizer)]
        ['a red car', 'a blue bench']

    Source: noun phrases as units: Feng et al. 2023, section 3.2, arXiv 2212.05032.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}")
    if hasattr(tokenizer, "encode_prompt"):
        tokenizer = tokenizer_of(tokenizer)
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: expected the text encoder's, such as pipe.tokenizer, got {tokenizer!r:.80}")
    plain = _without_weights(prompt)
    if phrases is not None:
        chunks = _given(plain, phrases)
    elif parser is not None:
        chunks = _of_spacy(plain, parser)
    else:
        chunks = _of_grammar(plain)
    of_text = text_tokens(tokenizer, prompt, tokens)

    def word(start: int, end: int, tag: str) -> Word:
        return Word(prompt[start:end], tag, start, end, tuple(t.index for t in covering(of_text, start, end)))

    found = []
    for chunk in chunks:
        words = [word(*place) for place in chunk]
        if words and words[-1].tokens:
            kept = tuple(w for w in words if w.tokens)
            start, end = kept[0].start, kept[-1].end
            found.append(NounPhrase(" ".join(plain[start:end].split()), kept, start, end))
    return found


def phrase_ids(
    phrases: Sequence[NounPhrase] | Sequence[Sequence[NounPhrase]], tokens: int = 77, *, fuse: str = "adjective-noun"
) -> Tensor:
    """The tensor that ``sdattn_fast.apply(pipe, phrases=...)`` takes.

    Args:
        phrases: What `find_phrases` gave, or a list of P such lists for P prompts.
        tokens: How many tokens the text has.
        fuse: Whose tokens of a phrase share an id: "adjective-noun", "all" words, or "noun". On our test models "all"
            lost 0.09 and 0.29 of the objects asked for, and "adjective-noun" none and 0.046 (docs/evaluation.md).

    Returns:
        (tokens,) int64 tensor, or (P, tokens) for P prompts: the number of each token's phrase, -1 outside phrases.

    Raises:
        TypeError: If `phrases` are others.
        ValueError: If a phrase has tokens beyond `tokens`, or `fuse` is another string.

    Examples:
        >>> ids = phrase_ids(find_phrases(prompt, pipe.tokenizer))
        >>> with sdattn_fast.apply(pipe, phrases=ids):
        ...     image = pipe(prompt).images[0]
    """
    lists: Any = phrases if phrases and not isinstance(phrases[0], NounPhrase) else [phrases]
    if any(isinstance(some, str) or not all(isinstance(p, NounPhrase) for p in some) for some in lists):
        raise TypeError(f"phrases: expected what find_phrases gives, or a list of such lists, got {phrases!r:.80}")
    ids = torch.full((len(lists), tokens), -1, dtype=torch.int64)
    for row, some in zip(ids, lists, strict=True):
        for number, phrase in enumerate(some):
            members = phrase.tokens(fuse)
            if members and max(members) >= tokens:
                raise ValueError(f"tokens: expected more than {max(members)}, which {phrase.text!r} has, got {tokens}")
            row[list(members)] = number
    return ids if lists is phrases else ids[0]


def head_words(phrases: Iterable[NounPhrase], words: Mapping[str, Sequence[int]]) -> list[str]:
    """Of each phrase the word that its head is, or is a part of, without the phrases whose head is none.

    words: word -> token indices, of `words_of`. Example: the phrases of "a red car, an old house" have "car", "house".
    """
    heads = [phrase.head.tokens for phrase in phrases]
    found = [next((word for word, tokens in words.items() if set(head) <= set(tokens)), None) for head in heads]
    return [word for word in found if word is not None]


Chunk = list[tuple[int, int, str]]  # words: start, end, tag


def _without_weights(prompt: str) -> str:
    """Blanks in the place of weights keep every other character's place."""
    return _WEIGHTS.sub(lambda found: " " * len(found[0]), prompt)


def _of_grammar(prompt: str) -> list[Chunk]:
    try:
        from nltk import RegexpParser, Tree
        from textblob.taggers import PatternTagger
    except ImportError as error:
        raise ImportError("noun phrases need textblob and nltk: pip install 'sdattn-fast[guidance]'") from error
    # A comma keeps apart what stands on both sides of "in front of".
    prompt = _PLACES.sub(lambda found: ",".ljust(len(found[0])), prompt)
    tagged, at = [], 0
    with _TAGGING:
        tags = PatternTagger().tag(prompt)
    for text, tag in tags:
        start = prompt.find(text, at)
        if start >= 0:  # the tagger spells some marks in its own way
            at = start + len(text)
            tagged.append((text, tag, start, at))
    if not tagged:
        return []
    tagged = _verbs_that_are_nouns(tagged)
    tree = RegexpParser(_GRAMMAR).parse([((text, start, end), tag) for text, tag, start, end in tagged])
    chunks = [node for node in tree if isinstance(node, Tree)]
    return [[(start, end, str(tag)) for (_, start, end), tag in chunk.leaves()] for chunk in chunks]


def _verbs_that_are_nouns(tagged: list[tuple[str, str, int, int]]) -> list[tuple[str, str, int, int]]:
    """The tagger knows one tag a word, and "bear" is a verb to it. What begins with a determiner or a number has a noun
    ("a bear"); one thing takes no verb in its plural form, unless it is one of several ("a man and a woman walk").
    """
    mended: list[tuple[str, str, int, int]] = []
    for text, tag, start, end in tagged:
        before = _before_noun(mended)
        nouns = [one for one in before if one[1].startswith("NN")]
        opened = bool(before) and before[0][1] in ("DT", "PRP$", "CD")
        first = len(mended) - len(before)
        joined = first > 0 and mended[first - 1][0].lower() in ("and", "or", "&")
        singular = opened and before[0][0].lower() in _A_SINGULAR
        several = opened and before[0][1] == "CD" and not singular
        noun = (
            (tag in _VERBS and opened and not nouns)
            or (tag in ("VB", "VBP") and singular and not joined)
            or (tag == "VBZ" and several and nouns[-1:] and nouns[-1][1] == "NN")
            or (bool(before) and text.lower().removesuffix("s") in _NOUNS)
        )
        mended.append((text, ("NNS" if text.lower().endswith("s") else "NN") if noun else tag, start, end))
    return mended


def _before_noun(tagged: list[tuple[str, str, int, int]]) -> list[tuple[str, str, int, int]]:
    """The end of what is tagged, as far as it may stand before a noun in its phrase."""
    first = len(tagged)
    while first and tagged[first - 1][1].startswith(("NN", "JJ", "VBN", "VBG", "CD")):
        first -= 1
    if first and tagged[first - 1][1] in ("DT", "PRP$"):
        first -= 1
    return tagged[first:]


def _of_spacy(prompt: str, parser: Any) -> list[Chunk]:
    if not callable(parser) or not hasattr(parser, "pipe_names"):
        raise TypeError(f"parser: expected a loaded spaCy pipeline or None, got {type(parser).__name__}")
    return [
        [(word.idx, word.idx + len(word.text), word.tag_) for word in chunk if word.i <= chunk.root.i]
        for chunk in parser(prompt).noun_chunks
    ]


def _given(prompt: str, phrases: Iterable[str]) -> list[Chunk]:
    if isinstance(phrases, str):
        raise TypeError(f"phrases: expected a list of str, got the str {phrases!r}")
    chunks = []
    after: dict[str, int] = {}
    for phrase in phrases:
        if not isinstance(phrase, str) or not _without_weights(phrase).strip():
            raise ValueError(f"phrases: expected some words of the prompt, got {phrase!r}")
        numbered = re.fullmatch(r"(.*\S) \((\d+)\)", phrase)
        words_of_it = _without_weights(numbered[1] if numbered else phrase).split()
        spaced = r"\s+".join(map(re.escape, words_of_it))
        before = "" if _UNSPACED.match(words_of_it[0][0]) else r"(?<!\w)"
        after_it = "" if _UNSPACED.match(words_of_it[-1][-1]) else r"(?!\w)"
        wanted = re.compile(f"{before}{spaced}{after_it}", re.IGNORECASE)
        if numbered:
            place = dict(enumerate(wanted.finditer(prompt), 1)).get(int(numbered[2]))
        else:
            place = wanted.search(prompt, after.get(phrase.lower(), 0))
        if place is None:
            words = [w for n in (1, 2, 3) for w in _windows(prompt.split(), n)]
            near = difflib.get_close_matches(phrase, words, 1, 0.0)
            again = " once more" if phrase.lower() in after else ""
            hint = f"; did you mean {near[0]!r}?" if near and not again else ""
            raise ValueError(f"phrases: {phrase!r} is not in the prompt{again}{hint}")
        after[phrase.lower()] = place.end()
        chunks.append(
            [(place.start() + w.start(), place.start() + w.end(), "NN") for w in re.finditer(r"\S+", place[0])]
        )
    return sorted(chunks, key=lambda chunk: chunk[0][0])


def _windows(words: list[str], count: int) -> list[str]:
    return [" ".join(words[i : i + count]) for i in range(len(words) - count + 1)]
