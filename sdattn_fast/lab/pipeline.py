"""The lab's pipelines and their CLIPs, whose weights the package sdattn-fast-lab has, and how they draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..loading import quiet_loading

__all__ = ["GUIDANCE", "STEPS", "WORLDS", "draw_scenes", "load_clip", "load_pipeline", "shapes_path", "world_path"]

GUIDANCE, STEPS = 4.0, 20
WORLDS = ("shapes", "objects")


def world_path(world: str) -> Path:
    """The folder of the pipeline of a world, as `save_pretrained` wrote it; its CLIPModel is in the subfolder `clip`.

    Raises: ImportError where the package that has it, sdattn-fast-lab, is missing; ValueError for a world that it does
    not have.
    """
    try:
        import sdattn_fast_lab
    except ImportError as error:
        raise ImportError(
            f"the {world} pipeline needs sdattn-fast-lab: pip install 'sdattn-fast[demo]' (in a checkout: -e ./lab)"
        ) from error
    return sdattn_fast_lab.path(world)


def shapes_path() -> Path:
    """`world_path` of "shapes"."""
    return world_path("shapes")


def load_pipeline(dtype: Any = None, folder: Path | None = None, world: str = "shapes") -> Any:
    """The pipeline of a world, a `StableDiffusionPipeline`. dtype: a torch.dtype, None for float32. folder: of another
    pipeline for that world, such as `sdattn_fast.lab.train` wrote; None for the one that ships.

    Raises: as `world_path`; ImportError where diffusers or transformers is missing; OSError where `folder` has none.
    """
    folder = world_path(world) if folder is None else folder  # before diffusers, which takes seconds to import

    import torch

    if folder.is_dir() and not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"folder: expected a pipeline, and {folder} has no model_index.json")
    with quiet_loading():
        try:
            from diffusers import StableDiffusionPipeline
        except ImportError as error:
            raise ImportError(f"the {world} pipeline needs diffusers: pip install 'sdattn-fast[diffusers]'") from error
        pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
        return pipe.to(dtype or torch.float32, silence_dtype_warnings=True)


def load_clip(dtype: Any = None, folder: Path | None = None, world: str = "shapes") -> tuple[Any, Any]:
    """A pipeline's CLIP: (CLIPModel, CLIPTokenizer), by default of the one that ships. Pictures go in as (n, 3, 64, 64)
    in [-1, 1].

    Raises: as `load_pipeline`.
    """
    folder = (world_path(world) if folder is None else folder) / "clip"

    import torch

    with quiet_loading():
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise ImportError(f"the {world} CLIP needs transformers: pip install 'sdattn-fast[diffusers]'") from error
        model: Any = CLIPModel.from_pretrained(folder)
        return model.to(dtype or torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


def draw_scenes(
    pipe: Any, scenes: Sequence[Any], *, first: int = 0, batch: int = 32, guidance: float = GUIDANCE,
    steps: int = STEPS, tick: Any = None,
) -> np.ndarray:  # fmt: skip
    """Pictures (n, 64, 64, 3) uint8 for captions of a world's scenes; picture i's noise depends on first + i alone.

    tick: called with the number of pictures that have come, after each batch.
    """
    import torch

    from ..guidance.pictures import uint8_pictures

    pictures = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(first + start + i) for i in range(len(part))]
        images = pipe(
            [s.caption for s in part], guidance_scale=guidance, num_inference_steps=steps, generator=generators,
            output_type="np",
        ).images  # fmt: skip
        pictures.append(uint8_pictures(images))
        if tick is not None:
            tick(len(part))
    return np.concatenate(pictures)
