"""Scores that `gradcam` and corrections differentiate: each grows as the picture follows its prompt better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..program import finite_number
from .pictures import decode_latents
from .preview import predicted_clean
from .relevance import Seen
from .token_maps import PhraseScore, for_each_picture, maps_of_tokens

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


class Presence(PhraseScore):
    """A score: how much attention each phrase has at its strongest pixel.

    The map of a phrase is the mean over its tokens, the captured layers (at the largest one's size) and the heads,
    smoothed by a Gaussian of sigma 0.5. The score is the mean over the B pictures. The patch needs a `capture` that
    keeps these tokens.

    Args:
        phrases: Token indices of each phrase, or what `find_phrases` gives, whose nouns count; for several prompts, a
            list of such lists, of which some may be empty: these pictures' score is 1.
        weakest: True takes the weakest phrase of each picture, as Attend-and-Excite does; False the mean over its
            phrases.
        sharpness: Attend-and-Excite's implementations take a softmax over all tokens but the first and the last, of
            the probabilities times 100, and smooth by a sigma of 0.71: pass 100.0 to have the scores that its
            thresholds refer to. It needs the maps of all tokens. None: the probabilities as they are.

    Raises:
        TypeError: If `phrases` are others, or `sharpness` is not a number.
        ValueError: If there is no phrase, one without tokens, or `sharpness` is not positive.

    Examples:
        >>> score = Presence(find_phrases(prompt, pipe.tokenizer))
        >>> def sum_of_phrases(seen):  # another score
        ...     return torch.stack([x.sum() for x in score.strongest(seen)]).mean()

    Source: Attend-and-Excite, Chefer et al. 2023, equations 1 and 2, arXiv 2301.13826, where 1 minus this is the loss.
    """

    needs_prediction = False

    def __init__(self, phrases: Sequence[Any], *, weakest: bool = True, sharpness: float | None = None) -> None:
        super().__init__(phrases)
        if sharpness is not None and finite_number("sharpness", sharpness) <= 0.0:
            raise ValueError(f"sharpness: expected a finite number > 0, got {sharpness}")
        self.weakest, self.sharpness = weakest, sharpness

    def by_picture(self, seen: Seen) -> Tensor:
        """The score of each picture.

        Args:
            seen: The prediction and its maps.

        Returns:
            A (B,) tensor in [0, 1], up to what upsampling overshoots.

        Raises:
            ValueError: If maps of these tokens are missing, or there are not as many lists as pictures.
        """
        return torch.stack([_score(x, self.weakest) for x in self.strongest(seen)])

    def strongest(self, seen: Seen) -> list[Tensor]:
        """The attention of each phrase at its strongest pixel.

        Args:
            seen: The prediction and its maps.

        Returns:
            For each picture, a tensor with one number per phrase, empty where it has none.

        Raises:
            ValueError: If maps of these tokens are missing, or there are not as many lists as pictures.
        """
        wanted = self.tokens if self.sharpness is None else (*seen.maps.tokens, *self.tokens)
        maps, place = maps_of_tokens(seen, tuple(dict.fromkeys(wanted)), "phrases")
        sigma = 0.5
        if self.sharpness is not None:
            maps, place = _sharpened(maps, seen.maps.tokens, self.sharpness)
            sigma = 0.5 * math.sqrt(
                2
            )  # its implementations divide by 2 sigma where a Gaussian divides by sqrt(2) sigma
        phrases = for_each_picture(self.phrases, len(maps), "phrases")
        return [
            _smoothed(torch.stack([x[[place[i] for i in phrase]].mean(0) for phrase in some]), sigma).flatten(1).amax(1)
            if some
            else x.new_zeros(0)
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


def _score(strongest: Tensor, weakest: bool) -> Tensor:
    if not len(strongest):
        return strongest.new_ones(())
    return strongest.amin() if weakest else strongest.mean()


def _sharpened(maps: Tensor, tokens: Sequence[int], sharpness: float) -> tuple[Tensor, dict[int, int]]:
    """Probabilities among the tokens between the first and the last, and where each token now is."""
    if tuple(tokens) != tuple(range(len(tokens))):
        raise ValueError(
            f"phrases: sharpness needs the maps of all tokens, got those of {tuple(tokens)}; "
            "apply(..., capture=Capture()) keeps them"
        )
    return (sharpness * maps[:, 1:-1]).softmax(1), {token: token - 1 for token in tokens[1:-1]}


def _smoothed(maps: Tensor, sigma: float) -> Tensor:
    """A Gaussian over 3x3 pixels, (T, 1, height, width)."""
    from kornia.filters import gaussian_blur2d

    border = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    return gaussian_blur2d(maps[:, None], (3, 3), (sigma, sigma), border_type=border)
