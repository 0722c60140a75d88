"""The lab: a world of shapes where the truth is known, and a small Stable Diffusion trained on it, shipped with us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["load_clip", "load_pipeline", "shapes_path"]


def shapes_path() -> Path:
    """The folder of the shapes pipeline, as `save_pretrained` wrote it; its CLIPModel is in the subfolder `clip`."""
    return Path(__file__).parent / "shapes"


def load_pipeline(torch_dtype: Any = None) -> Any:
    """The shapes pipeline, a `StableDiffusionPipeline`; torch_dtype defaults to float32.

    Raises: ImportError where diffusers or transformers is missing; OSError where the weights are.
    """
    import torch

    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise ImportError("the shapes pipeline needs diffusers: pip install 'sdattn-fast[diffusers]'") from error
    _quietly()
    return StableDiffusionPipeline.from_pretrained(shapes_path(), torch_dtype=torch_dtype or torch.float32)


def load_clip(torch_dtype: Any = None) -> tuple[Any, Any]:
    """The pipeline's CLIP: (CLIPModel, CLIPTokenizer). Pictures go in as (n, 3, 64, 64) in [-1, 1].

    Raises: ImportError, OSError, as `load_pipeline`.
    """
    import torch

    try:
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError("the shapes CLIP needs transformers: pip install 'sdattn-fast[diffusers]'") from error
    _quietly()
    folder = shapes_path() / "clip"
    model = CLIPModel.from_pretrained(folder, torch_dtype=torch_dtype or torch.float32).eval()
    return model, CLIPTokenizer.from_pretrained(folder)


def _quietly() -> None:
    """transformers draws a progress bar for every model that it loads; two megabytes need none."""
    from transformers.utils import logging

    logging.disable_progress_bar()
