"""Words of pipelines that clean a prompt before they tokenise it: against the ids that their text encoder is given."""

from __future__ import annotations

import copy
import re
import sys
from typing import Any

import pytest
import torch
from tiny_transformers import pixart_pipeline, wan_pipeline

import sdattn_fast
from sdattn_fast import Capture, guidance
from sdattn_fast.patching.prompt_cleaning import aligned
from sdattn_fast.patching.words import tokenizer_of, words_of


def unigram_tokenizer() -> Any:
    """As T5's: upper and lower case differ, here in how many tokens a word has."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁red", -1.0), ("▁car", -1.0)]
    inside = Tokenizer(Unigram(pieces + [(c, -9.0) for c in "▁aAbcCdeEfilnopRrstuk.,;&#\"'“”<>/0123456789"], 2, False))
    inside.pre_tokenizer = Metaspace()
    inside.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inside, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=512
    )


@pytest.mark.parametrize("clean_caption", [None, False, True])
@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a red car", {"a": "a", "red": "red", "car": "car"}),
        ("A Red CAR", {"A": "a", "Red": "red", "CAR": "car"}),
        ("  A  RED car ", {"A": "a", "RED": "red", "car": "car"}),
    ],
)
def test_words_of_a_pipeline_that_writes_prompts_in_lower_case(
    prompt: str, words: dict[str, str], clean_caption: bool | None
) -> None:
    pipe = pixart_pipeline()
    how = {} if clean_caption is None else {"clean_caption": clean_caption}
    how |= {"use_resolution_binning": False}
    ids, found = _encoded_and_found(pipe, prompt, how)
    assert {word: _spelled(pipe.tokenizer, ids, indices) for word, indices in found.items()} == words


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("A Red car", {"A": "A", "Red": "Red", "car": "car"}),
        ("a Red  &amp;lt;  car", {"a": "a", "Red": "Red", "amp;lt": "<", "car": "car"}),
    ],
)
def test_words_of_a_pipeline_that_replaces_entities(prompt: str, words: dict[str, str]) -> None:
    pipe = wan_pipeline()
    ids, found = _encoded_and_found(pipe, prompt, {"height": 64, "width": 64, "num_frames": 5})
    assert {word: _spelled(pipe.tokenizer, ids, indices) for word, indices in found.items()} == words


def test_captions_are_cleaned_as_they_were_when_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what `encode_prompt` was asked, and not by what a call says that was given embeddings."""
    from diffusers import PixArtAlphaPipeline

    def without_nicks(self: Any, text: Any, clean_caption: bool = False) -> list[str]:
        texts = [text] if isinstance(text, str) else text
        return [re.sub(r"@\w+ ?", "", one.lower()) if clean_caption else one.lower() for one in texts]

    monkeypatch.setattr(PixArtAlphaPipeline, "_text_preprocessing", without_nicks)
    prompt, spelled = "A @nick a RED car", {"A": "a", "a (2)": "a", "RED": "red", "car": "car"}
    for how in ({}, {"clean_caption": True}, {"clean_caption": False}):
        ids, found = _encoded_and_found(pixart_pipeline(), prompt, how | {"use_resolution_binning": False})
        cleaned = how.get("clean_caption", True)
        assert {word: _spelled(unigram_tokenizer(), ids, i) for word, i in found.items() if word != "nick"} == spelled
        assert ("nick" in found) != cleaned
    pipe = pixart_pipeline()
    pipe.tokenizer = unigram_tokenizer()
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        for cleaned in (False, True):
            names = (
                "prompt_embeds",
                "prompt_attention_mask",
                "negative_prompt_embeds",
                "negative_prompt_attention_mask",
            )
            made = dict(zip(names, pipe.encode_prompt(prompt, clean_caption=cleaned), strict=True))
            pipe(
                **made, negative_prompt=None, num_inference_steps=1, output_type="latent", use_resolution_binning=False
            )
            assert ("nick" in patch.maps.per_word(prompt)) != cleaned


def test_a_function_of_the_users_that_has_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline

    class Mine(WanPipeline):
        pass

    monkeypatch.setattr(sys.modules[__name__], "prompt_clean", lambda text: "another", raising=False)
    pipe = wan_pipeline()
    pipe.__class__ = Mine
    assert tokenizer_of(pipe).clean("a &amp; b") == "a & b"
    Mine.__bases__ = (type("Plain", (), {}),)
    assert tokenizer_of(pipe) is pipe.tokenizer


def test_phrases_of_a_pipeline_that_writes_prompts_in_lower_case() -> None:
    pipe, prompt = pixart_pipeline(), "A RED Car"
    pipe.tokenizer = unigram_tokenizer()
    (phrase,) = guidance.find_phrases(prompt, pipe, phrases=[prompt])
    assert phrase.tokens("all") == (0, 1, 2)
    (phrase,) = guidance.find_phrases(prompt, pipe.tokenizer, phrases=[prompt])
    assert len(phrase.tokens("all")) > 3
    assert guidance.find_phrases(prompt, pipe.tokenizer, phrases=["Car"])[0].tokens("all") != (2,)
    with pytest.raises(TypeError, match="tokenizer: expected the text encoder's"):
        guidance.find_phrases(prompt, object())


@pytest.mark.parametrize(
    "prompt, cleaned, words",
    [
        ("A “red” car’s roof", 'A "red" car\'s roof', ["A", "red", "car’s", "roof"]),
        ("a #123 car, A dog", "a car a dog", ["a", "", "car", "A", "dog"]),
        ("a&nbsp;red car", "a red car", ["a&nbsp;red", "car"]),
        ("http://x.com", "", [""]),
        ("http://car.com car", "car", ["", "car"]),
        ("CafÃ© car", "Café car", ["CafÃ©", "car"]),
        ("a @nick a red car", "a a red car", ["a", "", "a", "red", "car"]),
        ("", "", []),
        ("İstanbul car", "i̇stanbul car", ["İstanbul", "car"]),
    ],
)
def test_where_characters_of_a_cleaned_prompt_come_from(prompt: str, cleaned: str, words: list[str]) -> None:
    """words: of each of the prompt's, itself if some of what is left comes from it."""
    spans = aligned(prompt, cleaned)
    assert len(spans) == len(cleaned) and all(0 <= a <= b <= len(prompt) for a, b in spans)
    assert [a for a, _ in spans] == sorted(a for a, _ in spans)
    found, at = [], 0
    for word in prompt.split():
        start = prompt.index(word, at)
        at = start + len(word)
        found.append(word if any(a < at and start < b for a, b in spans) else "")
    assert [one.strip(",“”") for one in found] == words


def _encoded_and_found(pipe: Any, prompt: str, how: dict[str, Any]) -> tuple[list[int], Any]:
    """What the text encoder is given, and the words' tokens as a patch's maps have them."""
    tokenizer = pipe.tokenizer = unigram_tokenizer()
    pipe.text_encoder.resize_token_embeddings(len(tokenizer))
    given: list[list[int]] = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda _, args: given.append(args[0].tolist()[0]))
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        pipe(prompt, num_inference_steps=1, output_type="latent", **how)
        maps = patch.maps
    hook.remove()
    words = maps.per_word(prompt)
    found = words_of(maps._tokenizer, prompt, 512)
    for word, indices in found.items():
        torch.testing.assert_close(words[word], maps.upsample()[:, [maps.tokens.index(i) for i in indices]].mean(1))
    assert copy.deepcopy(maps).per_word(prompt).keys() == words.keys()
    return given[0], found


def _spelled(tokenizer: Any, ids: list[int], indices: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens([ids[i] for i in indices])).replace("▁", "")
