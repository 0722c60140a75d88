"""The CLIP gate's threshold for an evaluation: calibrated once, and kept in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..guidance.clip_gate import calibrate
from ..patching.words import tokenizer_of
from .world_subjects import world_subject

__all__ = ["gate_threshold"]


def gate_threshold(folder: Path, state: Any, pipe: Any, subject: Any, scorer: Any, world: str | None) -> float:
    """The threshold between a picture's own phrases and those of other prompts, on stock pictures of the first prompts,
    or of captions of the world that are not reported on; kept in the folder, so that all processes and later calls have
    the same."""
    path = folder / "threshold.json"
    with state.main_process_first():
        if not path.exists():
            calibrated_on = subject if world is None else world_subject(world, 32, scorer, choosing=True)
            count = min(32, len(calibrated_on.prompts))
            texts = [[p.text for p in calibrated_on.phrases(i, tokenizer_of(pipe))[1]] for i in range(count)]
            threshold = calibrate(
                pipe, scorer, calibrated_on.prompts[:count], texts, num_inference_steps=subject.steps,
                guidance_scale=subject.guidance,
            )  # fmt: skip
            write_json(path, "sdattn-fast threshold", {"threshold": threshold})
    stored = read_json(path, "sdattn-fast threshold").get("threshold")
    if isinstance(stored, bool) or not isinstance(stored, (int, float)) or not -1 <= stored <= 1:
        raise ValueError(f"{path}: expected a threshold, a cosine, got {stored!r}; remove the file to calibrate anew")
    return float(stored)
