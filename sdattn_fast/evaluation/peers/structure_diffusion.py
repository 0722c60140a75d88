"""StructureDiffusion: what attention reads is the mean of the prompt's text and of each noun phrase's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...guidance.phrases import NounPhrase
from ...patching.layers import cross_attention_layers
from ...patching.text_tokens import text_tokens
from .pipelines import no_stable_diffusion, pictures, preserved, stand_in

__all__ = ["StructureDiffusion", "value_text"]


@dataclass(frozen=True)
class StructureDiffusion:
    """Keys are the prompt's, and values the mean over V_p, V_1, ..., V_k: V_p those of the prompt, V_i those of its
    text in which phrase i's tokens are replaced by that phrase's, encoded by itself.

    The paper's O = 1 / (k + 1) * sum_i M V_i is M times the mean of V_i, and the mean of the projected texts is the
    projection of their mean, so one forward does it.

    Simplified: the paper takes every noun phrase of a constituency tree, nested ones too; here they are the phrases of
    the things to be drawn. The paper's other variant, keys of each phrase too, is left out.

    Source: Feng et al. 2023, "Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis",
    section 3.2, arXiv 2212.05032.
    """

    name: str = "StructureDiffusion"

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        return no_stable_diffusion(pipe)

    def draw(
        self, pipe: Any, prompts: Sequence[str], objects: Sequence[Sequence[NounPhrase]],
        generators: Sequence[torch.Generator], guidance: float, steps: int,
    ) -> np.ndarray:  # fmt: skip
        inner = stand_in(pipe)
        texts = [value_text(inner, prompt, things) for prompt, things in zip(prompts, objects, strict=True)]
        read = _OtherValues(torch.stack(texts))
        with preserved(inner.unet):
            for _, attn in cross_attention_layers(inner.unet):
                attn.set_processor(read)
            return pictures(inner, prompts, generators, guidance, steps)


@torch.no_grad()
def value_text(pipe: Any, prompt: str, phrases: Sequence[NounPhrase]) -> Tensor:
    """(tokens, channels): the text that the values are made of."""
    alone = [phrase.text for phrase in phrases]
    whole, *own = pipe.encode_prompt([prompt, *alone], pipe._execution_device, 1, False)[0]
    texts = [whole]
    for phrase, encoded in zip(phrases, own, strict=True):
        # A phrase at the end of a text that was cut has more tokens by itself than there.
        pairs = list(zip(phrase.tokens("all"), text_tokens(pipe.tokenizer, phrase.text), strict=False))
        text = whole.clone()
        text[[i for i, _ in pairs]] = encoded[[token.index for _, token in pairs]]
        texts.append(text)
    return torch.stack(texts).mean(0)


class _OtherValues:
    """Attention whose values are made of other texts (pictures, tokens, channels) than its keys; the unconditional
    half, which comes first, keeps its own."""

    def __init__(self, texts: Tensor) -> None:
        self.texts = texts

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None
    ) -> Tensor:
        text = encoder_hidden_states
        read = torch.cat([text[: len(text) - len(self.texts)], self.texts.to(text)])
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(read))
        )
        out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
