"""Pictures drawn with stock attention, with the maps of every head: what heads are ranked by.

A word's map in a head is the mean over denoising steps and over the word's tokens of the cross-attention probabilities,
upsampled bicubically.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api import apply
from ..arguments import check_seed
from ..guidance.pictures import pil_pictures
from ..patching.words import tokenizer_of, words_of
from ..program import Capture

__all__ = ["Head", "Observation", "observe", "sized"]

Head = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Observation:
    """A picture drawn with stock attention, with the maps of every head, as `observe` gives it.

    Attributes:
        prompt: Index of its prompt.
        picture: A PIL image.
        words: The words of its objects.
        heads: (layer, head) of every head, in the model's order.
        maps: (objects, heads, size, size) float16 tensor: probabilities times 1024.

    Examples:
        >>> observation = next(observe(pipe, ["a black cat and a white dog"], [["cat", "dog"]]))
        >>> observation.maps[0].mean(0)  # (64, 64), the map of "cat" over all heads
    """

    prompt: int
    picture: Any
    words: tuple[str, ...]
    heads: tuple[Head, ...]
    maps: Tensor


def observe(
    pipe: Any,
    prompts: Sequence[str],
    words: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    size: int = 64,
    batch: int = 8,
    layers: str | Sequence[str] = "*",
    **call_kwargs: Any,
) -> Iterator[Observation]:
    """Draw prompts with stock attention and keep every head's maps of the objects' words.

    Args:
        pipe: A diffusers pipeline with a tokenizer, not patched.
        prompts: The texts.
        words: For each prompt the words that name its objects; the second "circle" is "circle (2)".
        seed: Prompt i is drawn from the noise of seed + i.
        size: Height and width of the maps.
        batch: Number of prompts drawn at once.
        layers: Names or fnmatch patterns of layers.
        **call_kwargs: Passed to the pipeline, such as ``num_inference_steps``.

    Yields:
        A picture with its maps, for each prompt with a word that was not cut off.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or a prompt does not have a word.

    Examples:
        >>> for observation in observe(pipe, ["a black cat and a white dog"], [["cat", "dog"]]):
        ...     observation.picture.save(f"{observation.prompt}.png")

    Source: the maps are those of DAAM, Tang et al. 2023, arXiv 2210.04885.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a list of texts, got the str {prompts!r:.80}")
    check_seed(seed)
    if len(words) != len(prompts):
        raise ValueError(f"words: expected one list for each of {len(prompts)} prompts, got {len(words)}")
    for name, value, most in (("size", size, 8192), ("batch", batch, 4096)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if not 1 <= value <= most:
            raise ValueError(f"{name}: expected 1 to {most}, got {value!r:.40}")
    tokenizer = tokenizer_of(pipe)
    tokens = [_tokens_of(tokenizer, prompt, of_prompt) for prompt, of_prompt in zip(prompts, words, strict=True)]
    for start in range(0, len(prompts), batch):
        part = range(start, min(start + batch, len(prompts)))
        wanted = sorted({t for i in part for indices in tokens[i].values() for t in indices})
        if not wanted:
            continue
        capture = Capture(
            tuple(wanted), stage="softmax", reduce="none", layers=layers if isinstance(layers, str) else tuple(layers)
        )
        with apply(pipe, capture=capture) as patch:
            noise = [torch.Generator().manual_seed(seed + i) for i in part]
            images = pipe([prompts[i] for i in part], **{**call_kwargs, "output_type": "np"}, generator=noise).images
            pictures = pil_pictures(images)
            maps = patch.maps
        heads = tuple((layer, head) for layer, x in maps.items() for head in range(x.shape[1]))
        for row, i in enumerate(part):
            of_words = [
                torch.cat([_word_maps(x[row], [wanted.index(t) for t in ids], size) for x in maps.values()])
                for ids in tokens[i].values()
            ]
            if of_words:
                yield Observation(i, pictures[row], tuple(tokens[i]), heads, torch.stack(of_words))


def sized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps (n, h, w), upsampled bicubically."""
    if tuple(maps.shape[-2:]) == tuple(size[:2]):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size[:2]), mode="bicubic", align_corners=False)[:, 0]


def _tokens_of(tokenizer: Any, prompt: str, words: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of each word; words past the tokenizer's length are left out."""
    word_tokens = words_of(tokenizer, prompt)
    tokens: dict[str, list[int]] = {}
    for word in words:
        if word in word_tokens:
            tokens[word] = word_tokens[word]
        elif word.partition(" (")[0].lower() not in prompt.lower():
            raise ValueError(f"words: expected words of the prompt, {', '.join(map(repr, word_tokens))}, got {word!r}")
    return tokens


def _word_maps(maps: Tensor, tokens: list[int], size: int) -> Tensor:
    """(H, T, h, w) -> (H, size, size) float16, the mean over the word's tokens."""
    # Small probabilities would lose bits in float16.
    return sized(1024 * maps[:, tokens].float().mean(1), (size, size)).half().cpu()
