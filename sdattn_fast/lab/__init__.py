"""The lab: a world of shapes where the truth is known, and a small Stable Diffusion trained on it, shipped with us."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["load_clip", "load_pipeline", "quiet_loading", "shapes_path"]


def shapes_path() -> Path:
    """The folder of the shapes pipeline, as `save_pretrained` wrote it; its CLIPModel is in the subfolder `clip`."""
    return Path(__file__).parent / "shapes"


def load_pipeline(dtype: Any = None) -> Any:
    """The shapes pipeline, a `StableDiffusionPipeline`; dtype: a torch.dtype, None for float32.

    Raises: ImportError where diffusers or transformers is missing; OSError where the weights are.
    """
    import torch

    with quiet_loading():
        try:
            from diffusers import StableDiffusionPipeline
        except ImportError as error:
            raise ImportError("the shapes pipeline needs diffusers: pip install 'sdattn-fast[diffusers]'") from error
        pipe: Any = StableDiffusionPipeline.from_pretrained(shapes_path())
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


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the libraries' progress bars and warnings, as of the missing torchvision, which nothing here needs."""
    loggers = []
    for library in ("transformers", "diffusers"):  # in this order: diffusers looks at transformers' switches
        with contextlib.suppress(ImportError):
            loggers.append(importlib.import_module(f"{library}.utils.logging"))
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, (verbosity, bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()
