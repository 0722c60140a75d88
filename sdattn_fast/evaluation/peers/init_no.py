"""InitNO's choice of the noise: of several, the one whose first maps show every object, and each in its own place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...guidance.phrases import NounPhrase
from .attention import KeptMaps, as_grid, no_such_grid
from .pipelines import first_noise, no_stable_diffusion, pictures, preserved, stand_in

__all__ = ["InitialNoise", "scores"]


@dataclass(frozen=True)
class InitialNoise:
    """Of `noises` noises, the first of them stock's, that with the lowest sum of `scores` in the first forward.

    noises: 5, as often as the paper draws anew. resolution: the grid of the attention, a side or (height, width), as
    in the paper. conflict: the weight of the self-attention conflict score.

    Simplified: the paper also moves each noise's mean and deviation by Adam, under a KL term, until its scores are
    below 0.2 and 0.3, and then draws with Attend-and-Excite's steps; here noises are chosen and not moved, and drawn
    by the stock pipeline. A noun of several tokens has the mean of their maps. One picture a call; a prompt without
    objects is drawn as stock draws it.

    Source: Guo et al. 2024, "InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise Optimization",
    section 3, arXiv 2404.04650.
    """

    noises: int = 5
    resolution: int | tuple[int, int] = 16
    conflict: float = 1.0
    name: str = "InitNO, chosen noise"

    def __post_init__(self) -> None:
        if self.noises < 1:
            raise ValueError(f"noises: expected at least 1, got {self.noises}")

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        return no_stable_diffusion(pipe) or no_such_grid(pipe.unet, self.resolution)

    def draw(
        self, pipe: Any, prompts: Sequence[str], objects: Sequence[Sequence[NounPhrase]],
        generators: Sequence[torch.Generator], guidance: float, steps: int,
    ) -> np.ndarray:  # fmt: skip
        drawn = []
        for prompt, things, generator in zip(prompts, objects, generators, strict=True):
            inner = stand_in(pipe)
            with preserved(pipe.unet):
                noise = self._chosen(inner, prompt, [thing.tokens("noun") for thing in things], generator, steps)
            drawn.append(pictures(inner, [prompt], [generator], guidance, steps, latents=noise))
        return np.concatenate(drawn)

    @torch.no_grad()
    def _chosen(
        self, pipe: Any, prompt: str, nouns: Sequence[Sequence[int]], generator: torch.Generator, steps: int
    ) -> Tensor:
        stock = first_noise(pipe, generator)
        if not nouns or self.noises == 1:
            return stock
        # Of a copy: a scheduler that draws noise too goes on where stock's would.
        copied_generator = generator.clone_state()
        noises = [stock, *(first_noise(pipe, copied_generator) for _ in range(self.noises - 1))]
        pipe.scheduler.set_timesteps(steps, device=pipe._execution_device)
        timestep = pipe.scheduler.timesteps[0]
        text = pipe.encode_prompt(prompt, pipe._execution_device, 1, False)[0]
        totals = []
        for noise in noises:
            latents = pipe.scheduler.scale_model_input(noise * pipe.scheduler.init_noise_sigma, timestep)
            with KeptMaps(pipe.unet, as_grid(self.resolution), own=True) as attention_maps:
                pipe.unet(latents, timestep, encoder_hidden_states=text)
            response, conflict = scores(attention_maps.cross(), attention_maps.own(), nouns)
            totals.append(response + self.conflict * conflict)
        return noises[int(torch.stack(totals).argmin())]


def scores(cross: Tensor, own: Tensor, nouns: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The cross-attention response score and the self-attention conflict score, scalars, the lower the better.

    Response: 1 - the strongest pixel of the weakest noun, of softmax(100 * maps) over the text's tokens but the first
    and the last, smoothed, as in Attend-and-Excite. Conflict: the mean over pairs of nouns of
    sum(min(a, b)) / sum(a + b), a and b what their strongest pixels look at, smoothed; 0 of one noun.

    Args:
        cross: (height, width, tokens). own: (height * width, height * width), a row a query. nouns: token indices.
    """
    height, width, _ = cross.shape
    shares = torch.softmax(100 * cross[..., 1:-1], -1)
    maps = _smoothed(torch.stack([shares[..., [i - 1 for i in noun]].mean(-1) for noun in nouns])).flatten(1)
    response = (1 - maps.amax(1).amin()).clamp_min(0)
    seen = _smoothed(own[maps.argmax(1)].unflatten(1, (height, width))).flatten(1)
    first, second = torch.triu_indices(len(nouns), len(nouns), 1, device=cross.device)
    if not len(first):
        return response, torch.zeros_like(response)
    a, b = seen[first], seen[second]
    return response, (torch.minimum(a, b).sum(1) / (a + b).sum(1)).mean()


def _smoothed(maps: Tensor) -> Tensor:
    """(nouns, height, width) by 3x3 weights exp(-x^2 - y^2), what Attend-and-Excite's code calls a sigma of 1/2."""
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], device=maps.device, dtype=maps.dtype) ** 2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[:, 0]
