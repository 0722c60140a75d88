"""Rescaled guidance, a keyword of the stock pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...guidance.phrases import NounPhrase
from .pipelines import pictures, stand_in

__all__ = ["GuidanceRescale"]


@dataclass(frozen=True)
class GuidanceRescale:
    """``guidance_rescale=scale`` of the stock pipeline; 0.7 as in the paper.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4,
    arXiv 2305.08891.
    """

    scale: float = 0.7
    name: str = "guidance rescale"

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        if "guidance_rescale" not in inspect.signature(type(pipe).__call__).parameters:
            return f"a {type(pipe).__name__} takes no guidance_rescale"
        if guidance <= 1 or pipe.unet.config.time_cond_proj_dim is not None:
            return f"there is no unconditional half at guidance {guidance}"
        return None

    def draw(
        self, pipe: Any, prompts: Sequence[str], objects: Sequence[Sequence[NounPhrase]],
        generators: Sequence[torch.Generator], guidance: float, steps: int,
    ) -> np.ndarray:  # fmt: skip
        return pictures(stand_in(pipe), prompts, generators, guidance, steps, guidance_rescale=self.scale)
