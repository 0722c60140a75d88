"""What a score is before each correction of a short drawing."""

from __future__ import annotations

from typing import Any

import torch

import sdattn_fast
from sdattn_fast import Capture
from sdattn_fast.guidance import Correction, Seen


def corrected_scores(pipe: Any, prompt: str, score: Any, strength: float) -> list[float]:
    """The scores that three corrections of this strength see, from the same noise each time."""
    found: list[float] = []

    def watched(seen: Seen) -> torch.Tensor:
        value = score(seen)
        found.append(value.item())
        return value

    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with Correction(patch, watched, steps=(0, 3), strength=strength) as correct:
            pipe(
                prompt, num_inference_steps=4, output_type="latent", callback_on_step_end=correct,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
    return found
