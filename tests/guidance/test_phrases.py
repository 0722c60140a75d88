"""Noun phrases of prompts, and their tokens."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_tokenizers import WithoutOffsets

pytest.importorskip("textblob")
pytest.importorskip("nltk")

from sdattn_fast.guidance.phrases import find_phrases, head_words, phrase_ids
from sdattn_fast.lab import load_pipeline
from sdattn_fast.lab.shapes.world import sample_scene
from sdattn_fast.patching.text_tokens import text_tokens
from sdattn_fast.patching.words import words_of


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_pipeline().tokenizer


def _texts(prompt: str, tokenizer: Any, **how: Any) -> list[str]:
    return [p.text for p in find_phrases(prompt, tokenizer, **how)]


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a red fire truck and two small blue benches", ["a red fire truck", "two small blue benches"]),
        ("A photo of a running dog, behind the old house!", ["A photo", "a running dog", "the old house"]),
        ("the  red\tcar; the car", ["the red car", "the car"]),
        ("a (red:1.2) car and [a] blue++ bench", ["a red car", "a blue bench"]),
        ("(a red)1.3 car, a dark-- (old house)-, a [blue bench]0.8", ["a red car", "a dark old house", "a blue bench"]),
        ('("a red car", "a blue bench").and(), a cat.swap("dog")', ["a red car", "a blue bench", "a cat", "dog"]),
        ("cats in front of houses, a cup on the left side of a box", ["cats", "houses", "a cup", "a box"]),
        ("the front of the house, a black-and-white cat", ["the front", "the house", "a black-and-white cat"]),
        ("the red and the blue", ["the red", "the blue"]),
        ("run quickly!", []),
        ("", []),
        (" ,. ", []),
    ],
)
def test_what_is_a_phrase(prompt: str, expected: list[str], tokenizer: Any) -> None:
    assert _texts(prompt, tokenizer) == expected


def test_every_phrase_of_the_shapes_world(tokenizer: Any) -> None:
    for seed in range(200):
        scene = sample_scene(seed)
        found = find_phrases(scene.caption, tokenizer)
        assert [p.head.text for p in found] == [w.split()[-1] for w in (q.text for q in scene.phrases)], scene.caption


@pytest.mark.parametrize("slow", [False, True])
def test_tokens(slow: bool, tokenizer: Any) -> None:
    """The shapes tokenizer knows few words: fire is four pieces, truck five."""
    found = find_phrases("a red fire truck, a circle", WithoutOffsets(tokenizer) if slow else tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a red fire truck, a circle").input_ids)

    def said(tokens: tuple[int, ...]) -> str:
        return "".join(pieces[i] for i in tokens).replace("</w>", " ").strip()

    assert [said(p.tokens()) for p in found] == ["a red fire truck", "a circle"]
    assert [said(p.tokens("adjective-noun")) for p in found] == ["red fire truck", "circle"]
    assert [said(p.tokens("noun")) for p in found] == ["truck", "circle"]
    ids = phrase_ids(found, 30)
    assert ids.dtype == torch.int64 and ids.shape == (30,)
    assert {int(i) for i in ids} == {-1, 0, 1}
    assert tuple((ids == 0).nonzero().flatten().tolist()) == found[0].tokens("adjective-noun")
    both = phrase_ids([found, found[1:]], 30, fuse="noun")
    assert both.shape == (2, 30) and int(both[1].max()) == 0


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fire truck, and Z\u00fcrich's 12 old houses_x!  two",
        "it's we'll 'quote' don't",
        "a-b_c\u706b",
        "cat " * 80,
    ],
)
def test_without_offsets_words_have_the_same_tokens(prompt: str, tokenizer: Any) -> None:
    assert text_tokens(WithoutOffsets(tokenizer), prompt) == text_tokens(tokenizer, prompt) != []


def test_beyond_the_tokenizers_length(tokenizer: Any) -> None:
    prompt = "a red circle, " + "very " * 80 + "a blue square"
    assert _texts(prompt, tokenizer) == ["a red circle"]
    assert _texts("red " * 80 + "circle", tokenizer) == []
    with pytest.raises(ValueError, match="expected more than 3"):
        phrase_ids(find_phrases("a red circle", tokenizer), 3)


def test_in_chunks(tokenizer: Any) -> None:
    """Chunks of 75 between BOS and EOS, as compel makes them."""
    prompt = "a red circle, " + "very " * 80 + "a circle"
    (bos, *ids, eos), text = tokenizer(prompt).input_ids, []
    for at in range(0, len(ids), 75):
        text += [bos, *ids[at : at + 75], eos]
    room = -(-len(ids) // 75) * 77
    longer = find_phrases(prompt, tokenizer, tokens=room)
    assert [p.text for p in longer] == ["a red circle", "a circle"]
    assert longer[1].tokens("noun") == (len(text) - 2,) and text[-2] == text[longer[0].tokens("noun")[0]]
    assert find_phrases(prompt, tokenizer) == longer[:1]
    assert phrase_ids(longer, room).shape == (room,)


def test_the_words_of_heads(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<thing>", "<thing>_1"])
    prompt = "a red circle, the Circle, a blue <thing>, an old t-shirt"
    phrases = find_phrases(
        prompt, tokenizer, phrases=["a red circle", "the Circle", "a blue <thing>", "an old t-shirt"]
    )
    words = words_of(tokenizer, prompt)
    assert head_words(phrases, words) == ["circle", "Circle (2)", "<thing>", "t-shirt"]
    assert phrases[2].tokens("noun") == tuple(words["<thing>"]) and len(words["<thing>"]) == 2
    assert head_words(phrases, {"circle": words["circle"]}) == ["circle"]
    assert head_words(find_phrases("a cat/dog", tokenizer), words_of(tokenizer, "a cat/dog")) == ["cat/dog"]


def test_given_phrases(tokenizer: Any) -> None:
    prompt = "the red car and the Red  car, a carpet"
    found = find_phrases(prompt, tokenizer, phrases=["red car", "Red car", "carpet"])
    assert [(p.start, p.text) for p in found] == [(4, "red car"), (20, "Red car"), (32, "carpet")]
    weighted = find_phrases("a (red:1.2) car", tokenizer, phrases=["red car"])
    assert weighted[0].text == "red car" and weighted == find_phrases(
        "a (red:1.2) car", tokenizer, phrases=["(red:1.2) car"]
    )
    assert [w.text for w in weighted[0].words] == ["red", "car"]
    assert [p.start for p in find_phrases(prompt, tokenizer, phrases=["red car (2)", "carpet (1)"])] == [20, 32]
    assert find_phrases(prompt, tokenizer, phrases=[]) == []
    for phrases, words in (
        (["rde car"], "did you mean 'red car'"),
        (["carpet", "carpet"], "once more"),
        (["car p"], "'car p'"),
        (["carpet (2)"], r"'carpet \(2\)' is not in the prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            find_phrases(prompt, tokenizer, phrases=phrases)
    for bad in (["", "a"], [3], [None], ["()"]):
        with pytest.raises(ValueError, match="expected some words"):
            find_phrases(prompt, tokenizer, phrases=bad)
    with pytest.raises(TypeError, match="a list of str"):
        find_phrases(prompt, tokenizer, phrases="red car")


def test_a_spacy_pipeline(tokenizer: Any) -> None:
    """Its noun chunks are taken up to their root; a model cannot be downloaded here, so a stand-in."""
    words = [
        SimpleNamespace(i=i, idx=idx, text=t, tag_=tag) for i, idx, t, tag in ((0, 0, "the", "DT"), (1, 4, "car", "NN"))
    ]

    class Chunk(list):
        root = words[1]

    class Pipeline:
        pipe_names = ("tagger", "parser")

        def __call__(self, prompt: str) -> Any:
            return SimpleNamespace(noun_chunks=[Chunk(words)])

    assert _texts("the car", tokenizer, parser=Pipeline()) == ["the car"]
    with pytest.raises(TypeError, match="spaCy pipeline"):
        find_phrases("the car", tokenizer, parser="en_core_web_sm")


def test_bad_input(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="prompt: expected a str"):
        find_phrases(None, tokenizer)
    with pytest.raises(ValueError, match="which: expected"):
        find_phrases("a car", tokenizer)[0].tokens("verb")
    other_pieces = WithoutOffsets(tokenizer)
    other_pieces.tokenize = lambda text: list(text)
    with pytest.raises(ValueError, match="fast version"):
        find_phrases("a red circle", other_pieces)


def test_phrases_are_fused_in_a_pipeline(tokenizer: Any) -> None:
    import sdattn_fast

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle and a blue square"
    ids = phrase_ids(find_phrases(prompt, pipe.tokenizer))
    with sdattn_fast.apply(pipe, phrases=ids, capture=sdattn_fast.Capture(layers="*")) as patch:
        pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent")
        maps = next(iter(patch.maps.values()))[0]
    torch.testing.assert_close(maps[2], maps[3])
    torch.testing.assert_close(maps[6], maps[7])
    assert not torch.allclose(maps[3], maps[6])


def test_prompts_are_tagged_one_at_a_time(tokenizer: Any, monkeypatch: Any) -> None:
    """The tagger reads its lexicon at its first call: one beside it would tag by a part of it."""
    from textblob.taggers import PatternTagger

    inside, most = [], []

    def tag(self: Any, text: str) -> list[Any]:
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return []

    monkeypatch.setattr(PatternTagger, "tag", tag)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: find_phrases("a red car", tokenizer), range(4)))
    assert most == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a bear and a turtle", ["a bear", "a turtle"]),
        ("a teddy bear, a red car and a brown bear", ["a teddy bear", "a red car", "a brown bear"]),
        ("three teddy bears on a table", ["three teddy bears", "a table"]),
        ("a photo of a bus stop", ["a photo", "a bus stop"]),
        ("a pocket watch near two ski lifts", ["a pocket watch", "two ski lifts"]),
        ("a rose in a vase", ["a rose", "a vase"]),
        ("polar bears in the snow", ["polar bears", "the snow"]),
        ("a man and a woman walk in a park", ["a man", "a woman", "a park"]),
        ("a dog and a cat play chess", ["a dog", "a cat", "chess"]),
        ("two dogs run on a beach", ["two dogs", "a beach"]),
        ("the cat sits on a mat", ["the cat", "a mat"]),
    ],
)
def test_nouns_that_the_tagger_takes_for_verbs(tokenizer, prompt, expected):
    assert [phrase.text for phrase in find_phrases(prompt, tokenizer)] == expected


@pytest.mark.parametrize("phrases", ["abc", ["abc"], [["abc"]], [(1, 2)]])
def test_ids_are_of_phrases(phrases) -> None:
    with pytest.raises(TypeError, match="phrases: expected what find_phrases gives"):
        phrase_ids(phrases)


def test_a_pipeline_without_a_tokenizer() -> None:
    with pytest.raises(TypeError, match=r"tokenizer: expected the text encoder's, such as pipe\.tokenizer, got None"):
        find_phrases("a red car", None)
