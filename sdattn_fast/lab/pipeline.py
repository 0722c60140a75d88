"""The shapes pipeline and its CLIP, as they ship with this package, and how the pipeline draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..loading import quiet_loading

__all__ = ["GUIDANCE", "STEPS", "draw", "load_clip", "load_pipeline", "shapes_path"]

GUIDANCE, STEPS = 4.0, 20


def shapes_path() -> Path:
    """The folder of the shapes pipeline, as `save_pretrained` wrote it; its CLIPModel is in the subfolder `clip`."""
    return Path(__file__).parent / "shapes"


def load_pipeline(dtype: Any = None, folder: Path | None = None) -> Any:
    """The shapes pipeline, a `StableDiffusionPipeline`. dtype: a torch.dtype, None for float32. folder: of another
    pipeline for the shapes world, such as `sdattn_fast.lab.train` wrote; None for the one that ships.

    Raises: ImportError where diffusers or transformers is missing; OSError where the weights are.
    """
    import torch

    with quiet_loading():
        try:
            from diffusers import StableDiffusionPipeline
        except ImportError as error:
            raise ImportError("the shapes pipeline needs diffusers: pip install 'sdattn-fast[diffusers]'") from error
        pipe: Any = StableDiffusionPipeline.from_pretrained(folder or shapes_path())
        return pipe.to(dtype or torch.float32, silence_dtype_warnings=True)


def load_clip(dtype: Any = None) -> tuple[Any, Any]:
    """The pipeline's CLIP: (CLIPModel, CLIPTokenizer). Pictures go in as (n, 3, 64, 64) in [-1, 1].

    Raises: ImportError, OSError, as `load_pipeline`.
    """
    import torch

    with quiet_loading():
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise ImportError("the shapes CLIP needs transformers: pip install 'sdattn-fast[diffusers]'") from error
        folder = shapes_path() / "clip"
        model: Any = CLIPModel.from_pretrained(folder)
        return model.to(dtype or torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


def draw(pipe: Any, scenes: Sequence[Any], *, first: int = 0, batch: int = 32, tick: Any = None) -> np.ndarray:
    """Pictures (n, 64, 64, 3) uint8 for captions of `world.Scene`s; picture i's noise depends on first + i alone."""
    import torch

    from ..guidance.pictures import uint8_pictures

    pictures = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(first + start + i) for i in range(len(part))]
        images = pipe(
            [s.caption for s in part], guidance_scale=GUIDANCE, num_inference_steps=STEPS, generator=generators,
            output_type="np",
        ).images  # fmt: skip
        pictures.append(uint8_pictures(images))
        if tick is not None:
            tick(len(part))
    return np.concatenate(pictures)
