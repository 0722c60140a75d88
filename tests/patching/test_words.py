"""The words of prompts and their tokens: against the ids that pipelines, compel and lpw give the text encoder."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_tokenizers import WithoutOffsets, byte_level_tokenizer
from PIL import Image

import sdattn_fast
from sdattn_fast import Capture
from sdattn_fast.patching.maps import Maps, WordMaps
from sdattn_fast.patching.words import ByWord, tokenizer_of, words_of

MERGES = ("c a", "ca r</w>", "Ã ©</w>", "s h", "sh i", "r t</w>", "' t</w>", "f Ã")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_level_tokenizer(tmp_path_factory.mktemp("plain"), MERGES)


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With the tokens that `load_textual_inversion` adds for embeddings of three, one and two vectors."""
    made = byte_level_tokenizer(tmp_path_factory.mktemp("inverted"), MERGES)
    made.add_tokens(["<thing>", "<thing>_1", "<thing>_2", "<one>", "sks", "sks_1"])
    return made


def ids_of(tokenizer: Any, prompt: str) -> list[int]:
    """What a pipeline of diffusers gives its text encoder."""
    from diffusers.loaders import TextualInversionLoaderMixin

    text = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    return tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids


def content(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text).input_ids[1:-1]


def spelled(tokenizer: Any, ids: list[int]) -> str:
    """In the byte-level alphabet, without the ends of words: what follows a word may move its end."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("</w>", "")


PLAIN = [
    ("a red car", ["a", "red", "car"]),
    ("A Red car, a red CAR", ["A", "Red", "car", "a (2)", "red (2)", "CAR (2)"]),
    ("a t-shirt, don't!", ["a", "t-shirt", "don't"]),
    ("(a) , ... “red” -- «car»", ["a", "red", "car"]),
    ("Café façade", ["Café", "façade"]),
    ("Cafe\u0301 car", ["Cafe\u0301", "car"]),
    ("红色的车，一辆 車。", ["红色的车，一辆", "車"]),
    ("a 🚗, 👩🏽\u200d🚀!", ["a", "🚗", "👩🏽\u200d🚀"]),
    ("ΟΔΟΣ, Σ", ["ΟΔΟΣ", "Σ"]),
    ("ÀÉ x², 1.5 C++", ["ÀÉ", "x²", "1.5", "C"]),
    ("  \t\n", []),
    ("", []),
]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("prompt, words", PLAIN)
def test_words_are_named_as_written_and_have_the_tokens_they_have_alone(
    prompt: str, words: list[str], slow: bool, plain: Any
) -> None:
    found = words_of(WithoutOffsets(plain) if slow else plain, prompt)
    assert list(found) == words
    ids = ids_of(plain, prompt)
    for word, indices in found.items():
        assert spelled(plain, [ids[i] for i in indices]) == spelled(plain, content(plain, word.removesuffix(" (2)")))
    assert sorted(i for indices in found.values() for i in indices) == [i for some in found.values() for i in some]


@pytest.mark.parametrize("slow", [False, True])
def test_a_mark_in_a_words_first_token(slow: bool, plain: Any) -> None:
    """CLIP reads "'t" as one: here a token is of the word that it begins."""
    found = words_of(WithoutOffsets(plain) if slow else plain, "'tis it")
    pieces = plain.convert_ids_to_tokens(ids_of(plain, "'tis it"))
    assert {word: [pieces[i] for i in some] for word, some in found.items()} == {
        "tis": ["'t</w>", "i", "s</w>"], "it": ["i", "t</w>"]
    }  # fmt: skip


THING, SKS = ["<thing>", "<thing>_1", "<thing>_2"], ["sks", "sks_1"]
INVERTED = [
    ("red <thing> car", {"red": ["r", "e", "d</w>"], "<thing>": THING, "car": ["car</w>"]}),
    ("<one> <thing>, <thing>!", {"<one>": ["<one>"], "<thing>": THING, "<thing> (2)": THING}),
    ("a <thing>-car (<one>)", {"a": ["a</w>"], "<thing>": THING, "car": ["car</w>"], "<one>": ["<one>"]}),
    ("sks car, asks", {"sks": SKS, "car": ["car</w>"], "a": ["a</w>"], "sks (2)": SKS}),
]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("prompt, pieces", INVERTED)
def test_a_textual_inversion_is_a_word_with_all_its_vectors(
    prompt: str, pieces: dict[str, list[str]], slow: bool, inverted: Any
) -> None:
    found = words_of(WithoutOffsets(inverted) if slow else inverted, prompt)
    of_text = inverted.convert_ids_to_tokens(ids_of(inverted, prompt))
    assert list(found) == list(pieces)
    assert {word: [of_text[i] for i in indices] for word, indices in found.items()} == pieces


def test_vectors_that_the_prompt_writes_itself_are_read_as_diffusers_reads_them(inverted: Any) -> None:
    prompt = "<thing>_1 <thing> car"
    pieces = inverted.convert_ids_to_tokens(ids_of(inverted, prompt))
    assert [pieces[i] for i in words_of(inverted, prompt)["car"]] == ["car</w>"]


def test_textual_inversion_in_a_pipeline(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    pipe.tokenizer, pipe.text_encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    pipe.load_textual_inversion({"<thing>": torch.randn(3, 32)})
    pipe.load_textual_inversion({"<one>": torch.randn(32)})
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        draw(pipe, "a <thing> car <one>")
        words, maps = patch.maps.per_word("a <thing> car <one>"), patch.maps.upsample()
    # BOS, a, three vectors, c, a, r, one vector.
    assert list(words) == ["a", "<thing>", "car", "<one>"]
    for word, tokens in {"a": [1], "<thing>": [2, 3, 4], "car": [5, 6, 7], "<one>": [8]}.items():
        torch.testing.assert_close(words[word], maps[:, tokens].mean(1))


def in_chunks(tokenizer: Any, prompt: str, tokens: int) -> list[int]:
    """compel: chunks of 75, each between a BOS and an EOS."""
    ids, made = content(tokenizer, prompt), []
    while len(made) < tokens:
        chunk, ids = ids[:75], ids[75:]
        made += [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (75 - len(chunk))]
    return made


def lpw(tokenizer: Any, prompt: str, chunks: int, no_boseos_middle: bool) -> list[int]:
    """The community pipeline: one padded list, of which chunks overlap by two; their ends are written over."""
    ids = content(tokenizer, prompt)[: 75 * chunks]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    padded = [bos, *ids, *[tokenizer.pad_token_id] * (75 * chunks - len(ids)), eos]
    if no_boseos_middle:
        return padded
    return [i for j in range(chunks) for i in (bos, *padded[75 * j + 1 : 75 * j + 76], eos)]


LONG = " ".join(f"car{i} red, {'x' * (i % 7)}z" for i in range(20))
LAYOUTS: dict[int, Callable[[Any, str], list[int]]] = {
    154: lambda t, p: in_chunks(t, p, 154),
    231: lambda t, p: in_chunks(t, p, 231),
    308: lambda t, p: lpw(t, p, 4, False),
    152: lambda t, p: lpw(t, p, 2, True),
    227: lambda t, p: lpw(t, p, 3, True),
}


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("tokens", LAYOUTS)
def test_long_prompts(tokens: int, slow: bool, plain: Any) -> None:
    used = WithoutOffsets(plain) if slow else plain
    ids = LAYOUTS[tokens](plain, LONG)
    assert len(ids) == tokens and 154 < len(content(plain, LONG)) < 225
    found = words_of(used, LONG, tokens)
    # A word at the end of what there is room for may have lost some of its tokens.
    for word, indices in list(found.items())[: None if tokens > 154 else -1]:
        name = word.partition(" (")[0]
        assert [ids[i] for i in indices] == content(plain, name), word
    assert ("car19" in found) == (tokens > 154)
    short = words_of(used, LONG)
    assert max(i for some in short.values() for i in some) == 75
    chunked = words_of(used, LONG, 154)
    assert set(short) < set(chunked)
    assert all(chunked[word] == some for word, some in list(short.items())[:-1])


def test_shorter_texts_have_one_chunk(plain: Any) -> None:
    assert words_of(plain, "a red car", 6) == {"a": [1], "red": [2, 3, 4]}
    assert words_of(plain, "a red car", 7)["car"] == [5]
    assert words_of(plain, "a", 2) == {}
    for wrong, error in ((0, ValueError), (-77, ValueError), (100, ValueError), (155, ValueError), (154.0, TypeError),
                         (True, TypeError), ("154", TypeError)):  # fmt: skip
        with pytest.raises(error, match="tokens: expected"):
            words_of(plain, "a red car", wrong)  # type: ignore[arg-type]


def test_maps_of_long_prompts(plain: Any) -> None:
    words = words_of(plain, LONG, 154)
    late = [word for word, some in words.items() if min(some) > 77]
    assert late
    whole = Maps({"x": torch.rand(1, 154, 4, 4)}, range(154), (4, 4), plain)
    assert list(whole.per_word(LONG)) == list(words)
    for word in late:
        torch.testing.assert_close(whole.per_word(LONG)[word], whole["x"][:, words[word]].mean(1))
    assert list(whole.overlay(Image.new("RGB", (8, 8)), LONG)) == list(words)
    assert list(whole.per_word(LONG, tokens=77)) == list(words_of(plain, LONG))
    some = tuple(words[late[0]])
    few = Maps({"x": torch.rand(1, len(some), 4, 4)}, some, (4, 4), plain)
    assert list(few.per_word(LONG)) == [late[0]]
    one = Maps({"x": torch.rand(1, 152, 4, 4)}, range(152), (4, 4), plain)
    assert list(one.per_word(LONG)) == list(words_of(plain, LONG, 152))
    with pytest.raises(ValueError, match=r"tokens: expected 1 to 77, chunks of 77 such as 154, or 152 .*, got 100"):
        Maps({"x": torch.rand(1, 100, 4, 4)}, range(100), (4, 4), plain).per_word(LONG)


def test_a_long_text_in_a_pipeline(build: Callable[[str], Any], draw: Any, tokenizer: Any) -> None:
    pipe, prompt = build("sd15"), "abc " * 26 + "dog"
    ids = torch.tensor(in_chunks(tokenizer, prompt, 154)).view(2, 77)
    with torch.no_grad():
        embeds = pipe.text_encoder(ids)[0].reshape(1, 154, -1)
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds))
        words, maps = patch.maps.per_word(prompt), patch.maps.upsample()
    torch.testing.assert_close(words["dog"], maps[:, [81, 82, 83]].mean(1))
    torch.testing.assert_close(words["abc (26)"], maps[:, [78, 79, 80]].mean(1))


def test_looking_words_up(plain: Any) -> None:
    maps = Maps({"x": torch.rand(1, 77, 4, 4)}, range(77), (4, 4), plain)
    words, shown = maps.per_word("A Café car"), maps.overlay(Image.new("RGB", (8, 8)), "A Café car")
    for found in (words, shown, words.upsample((3, 3)), words_of(plain, "A Café car")):
        assert list(found) == ["A", "Café", "car"]
        assert found["Car"] is found["car"] and found[unicodedata.normalize("NFD", "CAFÉ")] is found["Café"]
        assert "CAR" in found and "dog" not in found and 3 not in found and found.get("dog") is None
        with pytest.raises(KeyError, match=r"word: expected one of 'A', 'Café', 'car', got 'dog'"):
            found["dog"]
    assert ByWord({"Car": 1, "car": 2})["car"] == 2, "a word as it is written goes first"
    with pytest.raises(KeyError, match="expected one of no words"):
        WordMaps({})["car"]


def test_which_tokenizer(plain: Any, tokenizer: Any) -> None:
    assert tokenizer_of(SimpleNamespace(tokenizer=tokenizer, tokenizer_2=plain)) is tokenizer
    assert tokenizer_of(SimpleNamespace(tokenizer=None, tokenizer_2=plain)) is plain
    assert tokenizer_of(SimpleNamespace(tokenizer=None)) is None
    assert tokenizer_of(None) is None


def test_the_second_tokenizers_padding_is_no_word(tmp_path: Any) -> None:
    """SDXL's second pads with "!", which is a special token then."""
    second = byte_level_tokenizer(tmp_path, MERGES, pad_token="!")
    assert words_of(second, "a car!") == {"a": [1], "car": [2]}
    assert words_of(second, "wow!car !") == {"wow!car": [1, 2, 3, 4, 5]}


def test_what_the_vocabulary_does_not_have_is_left_out(tokenizer: Any) -> None:
    """The tiny tokenizer knows letters alone; CLIP's own knows every byte."""
    found = words_of(tokenizer, "a 红色 t-shirt <|endoftext|> b")
    ids = ids_of(tokenizer, "a 红色 t-shirt <|endoftext|> b")
    assert list(found) == ["a", "t-shirt", "b"]
    for word, letters in {"a": "a", "t-shirt": "tshirt", "b": "b"}.items():
        assert spelled(tokenizer, [ids[i] for i in found[word]]) == letters


def test_tokens_that_do_not_spell_the_prompt(plain: Any) -> None:
    """A slow tokenizer that says other tokens than it gives, pieces of another alphabet, or another text."""
    for tokenize in (
        lambda text: [*plain.tokenize(text), "a</w>"], lambda text: ["▁a", "▁red"], lambda text: plain.tokenize("b car")
    ):  # fmt: skip
        slow = WithoutOffsets(plain)
        slow.tokenize = tokenize
        with pytest.raises(ValueError, match=r"tokenizer: the tokens of WithoutOffsets do not spell .* fast version"):
            words_of(slow, "a car")
