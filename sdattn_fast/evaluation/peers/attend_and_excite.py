"""Attend-and-Excite, as diffusers has it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...guidance.phrases import NounPhrase
from .attention import as_grid, no_such_grid
from .pipelines import no_stable_diffusion, pictures, preserved, sibling, stand_in

__all__ = ["AttendAndExcite"]


@dataclass(frozen=True)
class AttendAndExcite:
    """`StableDiffusionAttendAndExcitePipeline` of diffusers, unchanged, on a pipeline's modules; one picture a call.

    It asks for every token of every object's noun. Defaults are the paper's, for Stable Diffusion at 512x512; the paper
    counts 50 steps, and here what it says of step 10 holds after a fifth of them.

    scale: of the gradient step. resolution: the grid of the cross-attention it looks at, a side or (height, width).
    until: the share of the steps that move latents. thresholds: (share of the steps, attention): at that step latents
    are moved up to 20 times until all tokens' strongest pixels reach it.

    Source: Chefer et al. 2023, "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion
    Models", algorithm 1, arXiv 2301.13826.
    """

    scale: float = 20.0
    resolution: int | tuple[int, int] = 16
    until: float = 0.5
    thresholds: tuple[tuple[float, float], ...] = ((0.0, 0.05), (0.2, 0.5), (0.4, 0.8))
    name: str = "Attend-and-Excite"

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        if not hasattr(_diffusers(), "StableDiffusionAttendAndExcitePipeline"):
            return "this diffusers has no StableDiffusionAttendAndExcitePipeline"
        reason = no_stable_diffusion(pipe)
        if reason is None and not isinstance(pipe.unet.config.sample_size, int):
            reason = "its pipeline draws squares alone"
        return reason or no_such_grid(pipe.unet, self.resolution)

    def draw(
        self, pipe: Any, prompts: Sequence[str], objects: Sequence[Sequence[NounPhrase]],
        generators: Sequence[torch.Generator], guidance: float, steps: int,
    ) -> np.ndarray:  # fmt: skip
        exciting = sibling(_diffusers().StableDiffusionAttendAndExcitePipeline, pipe)
        options: dict[str, Any] = {
            "scale_factor": self.scale,
            "attn_res": as_grid(self.resolution),
            "max_iter_to_alter": round(self.until * steps),
            "thresholds": {round(share * steps): least for share, least in self.thresholds},
        }
        drawn = []
        for prompt, things, generator in zip(prompts, objects, generators, strict=True):
            call_args = ([prompt], [generator], guidance, steps)
            tokens = sorted({i for thing in things for i in thing.tokens("noun")})
            if not tokens:
                drawn.append(pictures(stand_in(pipe), *call_args))
                continue
            with preserved(pipe.unet), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.meshgrid")  # of diffusers' smoothing
                drawn.append(pictures(exciting, *call_args, token_indices=[tokens], **options))
        return np.concatenate(drawn)


def _diffusers() -> Any:
    import diffusers

    return diffusers
