"""CLIP as a judge of pictures: the cosine similarity of a picture and a text (Hessel et al. 2021, "CLIPScore")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loading import load_model
from .pictures import check_finite

__all__ = ["ClipScorer"]

_BATCH = 64


class ClipScorer:
    """CLIP's similarity of pictures and texts.

    Args:
        model: A CLIPModel of transformers.
        tokenizer: Its tokenizer.
        processor: Its CLIPImageProcessor.

    Raises:
        ValueError: If these do not belong together.

    Examples:
        >>> clip = ClipScorer.load("openai/clip-vit-large-patch14")
        >>> cosines = clip.similarity([image], ["a red car"])  # (1,)
        >>> cosines = clip.pictures([image]) @ clip.texts(["a car", "a dog"]).T  # (1, 2)

    Source: Radford et al. 2021, arXiv 2103.00020; CLIPScore, Hessel et al. 2021, arXiv 2104.08718.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        _check_text_side(model.config.text_config, tokenizer)
        _check_picture_side(model.config.vision_config, processor)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self._length = min(int(tokenizer.model_max_length), int(model.config.text_config.max_position_embeddings))
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> ClipScorer:
        """Load a CLIP with its tokenizer and picture processor.

        Args:
            name: A folder or an id of the Hugging Face Hub.
            device: Where the model runs.

        Returns:
            The scorer.

        Raises:
            ImportError: If transformers is missing.
            OSError: If there is no CLIP.
            ValueError: If weights are missing, or the parts do not belong together.
        """
        from ..loading import quiet_loading

        with quiet_loading():
            try:
                from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
            except ImportError as error:
                raise ImportError("CLIP scores need transformers: pip install 'sdattn-fast[diffusers]'") from error
            source = str(name)
            model = load_model(CLIPModel, source, "clip", device)
            tokenizer, processor = CLIPTokenizer.from_pretrained(source), CLIPImageProcessor.from_pretrained(source)
        return cls(model, tokenizer, processor)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Any]) -> Tensor:
        """Embed pictures.

        Args:
            pictures: n PIL images or (height, width, 3) uint8 arrays.

        Returns:
            (n, width) float32 tensor on the CPU, rows of length 1.

        Raises:
            ValueError: If there is none, or a picture or its embedding has NaN or infinity.
        """
        if not len(pictures):
            raise ValueError("pictures: expected at least one, got none")
        check_finite(pictures)  # the processor makes bytes of floats, and black pixels of NaN
        found = []
        for start in range(0, len(pictures), _BATCH):
            part = list(pictures[start : start + _BATCH])
            pixels = self.processor(part, return_tensors="pt").pixel_values.to(self.model.device, torch.float32)
            found.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        embeddings = torch.nn.functional.normalize(torch.cat(found), dim=-1).cpu()
        bad = (~torch.isfinite(embeddings).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"pictures: expected finite embeddings from CLIP, got NaN or infinity for picture {bad[0]} of "
                f"{len(pictures)}; are its weights whole?"
            )
        return embeddings

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, and remember them.

        Args:
            texts: n texts, cut to CLIP's 77 tokens.

        Returns:
            (n, width) float32 tensor on the CPU, rows of length 1.

        Raises:
            TypeError: If they are no texts.
            ValueError: If there is none.
        """
        if isinstance(texts, str) or any(not isinstance(text, str) for text in texts):
            raise TypeError(f"texts: expected a list of str, got {texts!r:.80}")
        if not len(texts):
            raise ValueError("texts: expected at least one, got none")
        for text in texts:
            if text not in self._texts:
                ids = self.tokenizer(
                    [text], padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
                ).input_ids.to(self.model.device)
                x = self.model.text_projection(self.model.text_model(ids).pooler_output)
                self._texts[text] = torch.nn.functional.normalize(x, dim=-1)[0].cpu()
        return torch.stack([self._texts[text] for text in texts])

    def similarity(self, pictures: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """The cosine of each picture with the text of the same index.

        Args:
            pictures: n pictures, as in `pictures`.
            texts: n texts.

        Returns:
            (n,) float32 tensor on the CPU.

        Raises:
            ValueError: If their numbers differ, or in the cases of `pictures`.
        """
        if len(pictures) != len(texts):
            raise ValueError(f"texts: expected one for each of {len(pictures)} pictures, got {len(texts)}")
        return (self.pictures(pictures) * self.texts(texts)).sum(-1)


def _check_text_side(config: Any, tokenizer: Any) -> None:
    """The tokenizer counts as the text model does, and ends a text with the token whose state is the text's."""
    words, known = len(tokenizer), int(config.vocab_size)
    if words <= len(set(tokenizer.all_special_tokens)):
        raise ValueError("clip: its tokenizer knows no words; are its files missing?")
    if words > known:
        raise ValueError(f"clip: its tokenizer has {words} tokens, and its text model knows {known}")
    # Configs written before transformers 4.31 say 2, whatever the tokenizer; CLIPTextModel then takes the greatest id.
    end = config.eos_token_id
    if end != 2 and tokenizer.eos_token_id != end:
        raise ValueError(
            f"clip: its tokenizer ends a text with token {tokenizer.eos_token_id}, its text model with {end}"
        )


def _check_picture_side(config: Any, processor: Any) -> None:
    blank = np.zeros((config.image_size + 8, config.image_size + 8, 3), np.uint8)
    height, width = processor(blank, return_tensors="pt").pixel_values.shape[-2:]
    if (height, width) != (config.image_size, config.image_size):
        raise ValueError(
            f"clip: its picture processor gives {height}x{width} pixels, its vision model takes "
            f"{config.image_size}x{config.image_size}"
        )
