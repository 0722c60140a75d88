"""SynGen: latents move so that a noun and its modifiers look at one place, and at another than all other words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...guidance.binding import BindingPair, binding_loss, syntactic_pairs
from ...guidance.phrases import NounPhrase
from .attention import KeptMaps, as_grid, no_such_grid
from .pipelines import first_noise, no_stable_diffusion, pictures, preserved, stand_in

__all__ = ["SynGen"]


@dataclass(frozen=True)
class SynGen:
    """Before each step of the first half, latents - scale * gradient of `binding_loss`, on the conditional forward.

    Defaults are the paper's, for Stable Diffusion 1.4 at 512x512. scale: of the gradient step. resolution: the grid of
    the cross-attention, a side or (height, width). until: the share of the steps that move latents.

    Simplified: the paper takes nouns and modifiers from a dependency parser, which also finds "the car is red"; here
    they are those of the noun phrases. A word of several tokens has their mean map, where the authors' code takes the
    pair of tokens that is farthest apart. A prompt without a modifier is drawn as stock draws it. One picture a call.

    Source: Rassin et al. 2023, "Linguistic Binding in Diffusion Models: Enhancing Attribute Correspondence through
    Attention Map Alignment", section 3, arXiv 2306.08877.
    """

    scale: float = 20.0
    resolution: int | tuple[int, int] = 16
    until: float = 0.5
    name: str = "SynGen"

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        return no_stable_diffusion(pipe) or no_such_grid(pipe.unet, self.resolution)

    def draw(
        self, pipe: Any, prompts: Sequence[str], objects: Sequence[Sequence[NounPhrase]],
        generators: Sequence[torch.Generator], guidance: float, steps: int,
    ) -> np.ndarray:  # fmt: skip
        with preserved(pipe.unet):
            drawn = [
                self._draw(stand_in(pipe), prompt, things, generator, guidance, steps)
                for prompt, things, generator in zip(prompts, objects, generators, strict=True)
            ]
        return np.concatenate(drawn)

    def _draw(
        self, pipe: Any, prompt: str, things: Sequence[NounPhrase], generator: torch.Generator, guidance: float,
        steps: int,
    ) -> np.ndarray:  # fmt: skip
        pairs = syntactic_pairs(pipe.tokenizer, prompt, things)
        acting = round(self.until * steps)
        if not pairs or not acting:
            return pictures(pipe, [prompt], [generator], guidance, steps)
        pipe.scheduler.set_timesteps(steps, device=pipe._execution_device)
        with torch.no_grad():
            text = pipe.encode_prompt(prompt, pipe._execution_device, 1, False)[0]

        def moved(latents: Tensor, step: int) -> Tensor:
            return latents - self.scale * _gradient(pipe, latents, step, text, pairs, as_grid(self.resolution))

        def before_next(_: Any, step: int, timestep: Any, callback_kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
            if step + 1 < acting:
                return {**callback_kwargs, "latents": moved(callback_kwargs["latents"], step + 1)}
            return callback_kwargs

        # The pipeline's callback comes after a step; what it begins with is moved beforehand.
        deviation = pipe.scheduler.init_noise_sigma
        noise = moved(first_noise(pipe, generator) * deviation, 0) / deviation
        return pictures(pipe, [prompt], [generator], guidance, steps, latents=noise, callback_on_step_end=before_next)


def _gradient(
    pipe: Any, latents: Tensor, step: int, text: Tensor, pairs: Sequence[BindingPair], grid: tuple[int, int]
) -> Tensor:
    timestep = pipe.scheduler.timesteps[step]
    with torch.enable_grad(), KeptMaps(pipe.unet, grid) as attention_maps:
        leaf = latents.detach().requires_grad_()
        pipe.unet(pipe.scheduler.scale_model_input(leaf, timestep), timestep, encoder_hidden_states=text)
        (gradient,) = torch.autograd.grad(binding_loss(attention_maps.cross(), pairs), leaf)
    return gradient
