"""Self-attention guidance, as diffusers has it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...guidance.phrases import NounPhrase
from .pipelines import no_stable_diffusion, pictures, preserved, sibling

__all__ = ["SelfAttentionGuidance"]


@dataclass(frozen=True)
class SelfAttentionGuidance:
    """`StableDiffusionSAGPipeline` of diffusers, unchanged, on a pipeline's modules. scale: 0.75 is diffusers' default.

    Source: Hong et al. 2023, "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance",
    arXiv 2210.00939.
    """

    scale: float = 0.75
    name: str = "self-attention guidance"

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        import diffusers

        if not hasattr(diffusers, "StableDiffusionSAGPipeline"):
            return "this diffusers has no StableDiffusionSAGPipeline"
        return no_stable_diffusion(pipe) or _no_middle(pipe.unet) or _no_schedule(pipe.scheduler)

    def draw(
        self, pipe: Any, prompts: Sequence[str], objects: Sequence[Sequence[NounPhrase]],
        generators: Sequence[torch.Generator], guidance: float, steps: int,
    ) -> np.ndarray:  # fmt: skip
        from diffusers import StableDiffusionSAGPipeline

        with preserved(pipe.unet):
            guided = sibling(StableDiffusionSAGPipeline, pipe)
            return pictures(guided, prompts, generators, guidance, steps, sag_scale=self.scale)


def _no_middle(unet: Any) -> str | None:
    """Its pipeline reads the self-attention of the middle block, and its heads off the config."""
    if not isinstance(unet.config.sample_size, int):
        return "its pipeline draws squares alone"
    transformers = getattr(unet.mid_block, "attentions", None)
    blocks = getattr(transformers[0], "transformer_blocks", None) if transformers else None
    if not blocks:
        return "the UNet has no transformer in its middle block"
    heads = unet.config.attention_head_dim
    heads = heads if isinstance(heads, int) else heads[-1]
    if blocks[0].attn1.heads != heads:
        return f"its pipeline takes the middle block's heads for {heads}, and they are {blocks[0].attn1.heads}"
    return None


def _no_schedule(scheduler: Any) -> str | None:
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(2)
    if torch.is_floating_point(probe.timesteps) or not hasattr(probe, "alphas_cumprod"):
        return f"its pipeline cannot do with a {type(scheduler).__name__}"
    return None
