"""CLIP as a judge of pictures: the cosine similarity of a picture and a text (Hessel et al. 2021, "CLIPScore")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ClipScorer"]

_BATCH = 64


class ClipScorer:
    """A CLIPModel with its tokenizer and picture processor.

    Raises: ImportError where transformers is missing; OSError, from transformers, where the model is.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> ClipScorer:
        """From the folder or hub id of a CLIP."""
        from ..lab import quiet_loading

        with quiet_loading():
            try:
                from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
            except ImportError as error:
                raise ImportError("CLIP scores need transformers: pip install 'sdattn-fast[diffusers]'") from error
            source = str(name)
            model: Any = CLIPModel.from_pretrained(source, use_safetensors=True)
            tokenizer, processor = CLIPTokenizer.from_pretrained(source), CLIPImageProcessor.from_pretrained(source)
        return cls(model.float().to(device), tokenizer, processor)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Any]) -> Tensor:
        """(n, width) float32, unit length, of PIL pictures or (height, width, 3) uint8 arrays."""
        found = []
        for start in range(0, len(pictures), _BATCH):
            part = list(pictures[start : start + _BATCH])
            pixels = self.processor(part, return_tensors="pt").pixel_values.to(self.model.device, torch.float32)
            found.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, width) float32, unit length; what is longer than CLIP's 77 tokens is cut."""
        for text in texts:
            if text not in self._texts:
                ids = self.tokenizer(
                    [text], padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length,
                    return_tensors="pt",
                ).input_ids.to(self.model.device)  # fmt: skip
                x = self.model.text_projection(self.model.text_model(ids).pooler_output)
                self._texts[text] = torch.nn.functional.normalize(x, dim=-1)[0].cpu()
        return torch.stack([self._texts[text] for text in texts])

    def similarity(self, pictures: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """(n,) cosines of picture i and text i. Raises: ValueError where their counts differ."""
        if len(pictures) != len(texts):
            raise ValueError(f"texts: expected one for each of {len(pictures)} pictures, got {len(texts)}")
        return (self.pictures(pictures) * self.texts(texts)).sum(-1)
