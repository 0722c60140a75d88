"""Perturbed-attention guidance, as diffusers has it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...guidance.phrases import NounPhrase
from .pipelines import pictures, preserved, sibling

__all__ = ["PerturbedAttention"]


@dataclass(frozen=True)
class PerturbedAttention:
    """`StableDiffusionPAGPipeline` of diffusers, or SDXL's, unchanged, on a pipeline's modules.

    scale: 3 is diffusers' default. adaptive: how fast the scale falls over the timesteps. layers: names or patterns of
    self-attention layers that look at nothing but themselves; by default the middle block's.

    Source: Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", arXiv 2403.17377.
    """

    scale: float = 3.0
    adaptive: float = 0.0
    layers: tuple[str, ...] = ("mid",)
    name: str = "perturbed-attention guidance"

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        if _kind(pipe) is None:
            return f"expected a StableDiffusionPipeline or SDXL's, got a {type(pipe).__name__}"
        names = [name for name, m in pipe.unet.named_modules() if getattr(m, "is_cross_attention", None) is False]
        missing = [layer for layer in self.layers if not any(re.search(layer, name) for name in names)]
        return f"no self-attention in {', '.join(missing)}" if missing else None

    def draw(
        self, pipe: Any, prompts: Sequence[str], objects: Sequence[Sequence[NounPhrase]],
        generators: Sequence[torch.Generator], guidance: float, steps: int,
    ) -> np.ndarray:  # fmt: skip
        with preserved(pipe.unet):
            guided = sibling(_kind(pipe), pipe, pag_applied_layers=list(self.layers))
            return pictures(
                guided, prompts, generators, guidance, steps, pag_scale=self.scale, pag_adaptive_scale=self.adaptive
            )


def _kind(pipe: Any) -> Any:
    import diffusers

    kinds = (
        (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionPAGPipeline),
        (diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLPAGPipeline),
    )
    return next((perturbed for kind, perturbed in kinds if isinstance(pipe, kind)), None)
