"""Scores that `gradcam` and corrections differentiate: each grows as the picture follows its prompt better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import decode_latents
from .preview import predicted_clean
from .relevance import Seen
from .token_maps import TokenScore, for_each_picture, maps_of_tokens

__all__ = ["NoisePrediction", "Presence", "ClipSimilarity"]


class NoisePrediction:
    """A score: minus the mean squared error of the UNet's prediction.

    Args:
        target: (B, C, height, width) tensor: the noise, velocity or clean latent, whichever the scheduler predicts.

    Examples:
        >>> relevance = gradcam(pipe.unet, latents, t, text, NoisePrediction(noise))
    """

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, seen: Seen) -> Tensor:
        """The score of a prediction.

        Args:
            seen: The prediction.

        Returns:
            A scalar tensor, <= 0.
        """
        return -F.mse_loss(seen.prediction.float(), self.target.to(seen.prediction.device).float())


class Presence(TokenScore):
    """A score: how much attention each phrase has at its strongest pixel.

    The map of a phrase is the mean over its tokens, the captured layers (at the largest one's size) and the heads,
    smoothed by a Gaussian of sigma 0.5. The score is the mean over the B pictures. The patch needs a `capture` that
    keeps these tokens.

    Args:
        phrases: Token indices of each phrase; for several prompts, a list of such lists.
        weakest: True takes the weakest phrase of each picture, as Attend-and-Excite does; False the mean over its
            phrases.

    Raises:
        ValueError: If there is no phrase, or one without tokens.

    Examples:
        >>> nouns = [phrase.tokens("noun") for phrase in find_phrases(prompt, pipe.tokenizer)]
        >>> score = Presence(nouns)
        >>> def sum_of_phrases(seen):  # another score
        ...     return torch.stack([x.sum() for x in score.strongest(seen)]).mean()

    Source: Attend-and-Excite, Chefer et al. 2023, equations 1 and 2, arXiv 2301.13826, where 1 minus this is the loss.
    """

    def __init__(self, phrases: Sequence[Any], *, weakest: bool = True) -> None:
        nested: list[list[Any]] = [[phrase] if isinstance(phrase, int) else list(phrase) for phrase in phrases]
        by_entry = bool(nested) and all(some and not isinstance(some[0], int) for some in nested)
        self.phrases = [[tuple(phrase) for phrase in some] for some in (nested if by_entry else [nested])]
        if any(not some or any(not phrase for phrase in some) for some in self.phrases):
            raise ValueError(f"phrases: expected token indices of at least one phrase, got {phrases!r}")
        self.weakest = weakest

    @property
    def tokens(self) -> tuple[int, ...]:
        """The indices of all tokens of all phrases."""
        return tuple(sorted({i for some in self.phrases for phrase in some for i in phrase}))

    def by_picture(self, seen: Seen) -> Tensor:
        """The score of each picture.

        Args:
            seen: The prediction and its maps.

        Returns:
            A (B,) tensor in [0, 1], up to what upsampling overshoots.

        Raises:
            ValueError: If maps of these tokens are missing, or there are not as many lists as pictures.
        """
        return torch.stack([x.amin() if self.weakest else x.mean() for x in self.strongest(seen)])

    def strongest(self, seen: Seen) -> list[Tensor]:
        """The attention of each phrase at its strongest pixel.

        Args:
            seen: The prediction and its maps.

        Returns:
            For each picture, a tensor with one number per phrase.

        Raises:
            ValueError: If maps of these tokens are missing, or there are not as many lists as pictures.
        """
        maps, place = maps_of_tokens(seen, self.tokens, "phrases")
        phrases = for_each_picture(self.phrases, len(maps), "phrases")
        return [
            _smoothed(torch.stack([x[[place[i] for i in phrase]].mean(0) for phrase in some])).flatten(1).amax(1)
            for x, some in zip(maps, phrases, strict=True)
        ]


class ClipSimilarity:
    """A score: CLIP's cosine of the predicted clean picture and a text, the mean over the B pictures.

    Gradients pass through the VAE's decoder, which takes memory.

    Args:
        pipe: The pipeline whose scheduler and VAE make the picture.
        clip: A CLIPModel of transformers.
        tokenizer: Its tokenizer.
        processor: Its CLIPImageProcessor.
        texts: One text for all pictures, or B texts.

    Examples:
        >>> score = ClipSimilarity(pipe, clip.model, clip.tokenizer, clip.processor, "a red car")

    Source: Radford et al. 2021, arXiv 2103.00020.
    """

    def __init__(self, pipe: Any, clip: Any, tokenizer: Any, processor: Any, texts: str | Sequence[str]) -> None:
        self.pipe, self.clip, self.processor = pipe, clip, processor
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids.to(clip.device)
        with torch.no_grad():
            self.texts = F.normalize(clip.text_projection(clip.text_model(ids).pooler_output), dim=-1)

    def __call__(self, seen: Seen) -> Tensor:
        """The score of a prediction.

        Args:
            seen: The prediction.

        Returns:
            A scalar float32 tensor in [-1, 1].
        """
        clean = predicted_clean(self.pipe.scheduler, seen.latents, seen.t, seen.prediction)
        picture = (decode_latents(self.pipe.vae, clean) / 2 + 0.5).clamp(0, 1)
        picture = F.interpolate(picture, size=self._size(), mode="bicubic", antialias=True)
        mean, deviation = (
            torch.tensor(x, device=picture.device)[:, None, None]
            for x in (self.processor.image_mean, self.processor.image_std)
        )
        pixels = ((picture - mean) / deviation).to(self.clip.dtype)
        embedding = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        return (F.normalize(embedding, dim=-1) * self.texts).sum(-1).mean().float()

    def _size(self) -> tuple[int, int]:
        side = int(self.clip.config.vision_config.image_size)
        return side, side


def _smoothed(maps: Tensor) -> Tensor:
    """A Gaussian of sigma 1/2 over 3x3 pixels, (T, height, width)."""
    from kornia.filters import gaussian_blur2d

    return gaussian_blur2d(maps[:, None], (3, 3), (0.5, 0.5), border_type="replicate")
